"""What a manifest says of a layout, and the names of the files: numbers and names in and out, the same as ever."""

import json
from typing import Any

import pytest

from overtok_megatron.checkpoint.layout import CheckpointLayout, LayoutKind
from overtok_megatron.checkpoint.table_file import TableFile

SIZES = {"pipeline_parallel_size": 2, "data_parallel_size": 3, "context_parallel_size": 4, "tensor_parallel_size": 5}
RANKS = CheckpointLayout(pipeline=2, data=3, context=4, tensor=5, zero_stage=1)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (
            RANKS,
            '{"pipeline_parallel_size": 2, "data_parallel_size": 3, "context_parallel_size": 4, "tensor_parallel_size": 5, '
            '"zero_stage": 1}',
        ),
        (
            CheckpointLayout(pipeline=2, kind=LayoutKind.WHOLE),
            '{"pipeline_parallel_size": 2, "data_parallel_size": 1, "context_parallel_size": 1, "tensor_parallel_size": 1, '
            '"zero_stage": -1}',
        ),
        (
            CheckpointLayout(pipeline=7, kind=LayoutKind.WEIGHTS_ONLY),
            '{"data_parallel_size": 1, "context_parallel_size": 1, "tensor_parallel_size": 1, "pipeline_parallel_size": 7, '
            '"zero_stage": -2}',
        ),
    ],
)
def test_manifests_keep_their_bytes(layout: CheckpointLayout, text: str) -> None:
    """The text is what versions before this type wrote."""
    assert json.dumps(layout.to_numbers()) == text
    assert CheckpointLayout.from_numbers(json.loads(text)) == layout


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (None, "layout: None is not a mapping"),
        ([1], r"layout: \[1\] is not a mapping"),
        (SIZES, "layout: zero_stage is missing"),
        ({"zero_stage": 0}, "layout: context_parallel_size is missing"),
        (SIZES | {"zero_stage": 0, "expert_parallel_size": 1}, "layout: expert_parallel_size is unknown"),
        (SIZES | {"zero_stage": 4}, "layout: zero_stage is 4"),
        (SIZES | {"zero_stage": -3}, "layout: zero_stage is -3"),
        (SIZES | {"zero_stage": True}, "layout: zero_stage is True"),
        (SIZES | {"zero_stage": 1, "tensor_parallel_size": 0}, "layout: tensor_parallel_size is 0"),
        (SIZES | {"zero_stage": 1, "data_parallel_size": "3"}, "layout: data_parallel_size is '3'"),
    ],
)
def test_what_is_not_a_layout_is_named(values: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CheckpointLayout.from_numbers(values)


def test_every_rank_of_the_model_writes_one_file() -> None:
    assert RANKS.model_parallel_ranks == 10
    assert RANKS.data_ranks == 12
    numbers = [RANKS.file_number(stage, tensor_rank) for stage in range(2) for tensor_rank in range(5)]
    assert numbers == list(range(10))
    assert list(RANKS.file_numbers(1)) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (TableFile.full(0, 82), "tables/rows-000000000000-000000000082.safetensors"),
        (TableFile(3, 5, 10**13), "tables/changed-0003-000000000005-10000000000000.safetensors"),
    ],
)
def test_a_table_files_name_says_what_it_holds(file: TableFile, name: str) -> None:
    assert file.name == name
    assert TableFile.parse(name) == file


@pytest.mark.parametrize(
    "name",
    [
        "rows-000000000000-000000000082.safetensors",
        "tables/rows-0-82.safetensors.partial",
        "tables/rows-0.safetensors",
        "tables/changed-0-82.safetensors",
        "dense/rows-0-82.safetensors",
    ],
)
def test_other_names_are_not_table_files(name: str) -> None:
    assert TableFile.parse(name) is None
