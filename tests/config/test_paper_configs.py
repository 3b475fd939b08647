"""The paper's five models: their counts and FLOPs are the paper's, and the two of each differ in one section."""

from pathlib import Path

import pytest

from overtok_megatron.config.counts import flops_per_token, parameter_counts
from overtok_megatron.config.loading import load_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate

FOLDER = Path(__file__).parent.parent.parent / "configs" / "paper"
MODELS = ("olmo2_151m", "olmo2_400m", "olmo2_1b", "olmoe_1b3", "olmoe_7b")


def load(name: str) -> RunConfig:
    loaded = load_config(FOLDER / f"{name}.yaml")
    for ranks in (1, 8, 32, 64):
        validate(loaded.config, ranks, loaded.locate)
    return loaded.config


def truncated(value: float, digits: int) -> float:
    """As the paper writes its numbers."""
    return int(value * 10**digits) / 10**digits


@pytest.mark.parametrize("model", MODELS)
def test_the_two_of_each_model_differ_in_one_section(model: str) -> None:
    baseline, overtok = (load(f"{model}_{kind}").model_dump() for kind in ("baseline", "overtok"))
    folders = [values["training"].pop("output_directory") for values in (baseline, overtok)]
    assert len(set(folders)) == 2
    assert [section for section in baseline if baseline[section] != overtok[section]] == ["over_encoding"]
    assert not baseline["over_encoding"]["enabled"]


def test_every_file_is_one_of_these() -> None:
    names = {f"{model}_{kind}" for model in MODELS for kind in ("baseline", "overtok")} | {"olmo2_base", "olmoe_base"}
    assert {path.stem for path in FOLDER.iterdir()} == names


@pytest.mark.parametrize(("model", "plain", "over_encoded"), [("olmoe_1b3", 51, 13.1), ("olmoe_7b", 102, 26.3)])
def test_embedding_parameters_are_those_of_table_1(model: str, plain: int, over_encoded: float) -> None:
    """In millions without n-grams, in billions with them, the 1-gram embedding included; cut, not rounded."""
    counts = parameter_counts(load(f"{model}_baseline"))
    assert truncated(counts.embedding / 1e6, 0) == plain
    counts = parameter_counts(load(f"{model}_overtok"))
    assert truncated((counts.embedding + counts.tables) / 1e9, 1) == over_encoded
    assert counts.tables == pytest.approx(12.8e6 * load(f"{model}_overtok").model.hidden_size, rel=1e-5)


def forward_gigaflops(config: RunConfig) -> float:
    """Of the products with weights, per token: no scores of attention, as the paper's table; norms are no products."""
    model, counts = config.model, parameter_counts(config)
    norms = model.num_layers * 4 * model.hidden_size + model.hidden_size  # two of the block, those of q and k
    weights = counts.blocks - counts.idle - norms + model.vocab_size * model.hidden_size + counts.encoder
    return 2 * weights / 1e9


@pytest.mark.parametrize(
    ("model", "plain", "over_encoded", "more"),
    [("olmoe_1b3", 0.5409, 0.5430, 0.38), ("olmoe_7b", 2.3578, 2.3662, 0.35)],
)
def test_forward_flops_are_those_of_table_8(model: str, plain: float, over_encoded: float, more: float) -> None:
    found = [forward_gigaflops(load(f"{model}_{kind}")) for kind in ("baseline", "overtok")]
    assert found == pytest.approx([plain, over_encoded], rel=1e-4)
    assert truncated(100 * (found[1] / found[0] - 1), 2) == more
    # what `overtok config` prints counts attention's scores, too, and three times as much for both directions
    both = [flops_per_token(load(f"{model}_{kind}")) for kind in ("baseline", "overtok")]
    assert both[1] - both[0] == pytest.approx(3e9 * (found[1] - found[0]))


@pytest.mark.parametrize(("model", "dense"), [("olmo2_151m", 151e6), ("olmo2_400m", 400e6), ("olmo2_1b", 1e9)])
def test_dense_models_have_the_parameters_that_name_them(model: str, dense: float) -> None:
    assert parameter_counts(load(f"{model}_baseline")).blocks == pytest.approx(dense, rel=0.08)
    assert parameter_counts(load("olmo2_151m_baseline")).blocks == pytest.approx(151e6, rel=0.002)


@pytest.mark.parametrize(("model", "total", "active"), [("olmoe_1b3", 1.3e9, 260e6), ("olmoe_7b", 7e9, 1.3e9)])
def test_mixtures_have_the_parameters_that_name_them(model: str, total: float, active: float) -> None:
    counts = parameter_counts(load(f"{model}_baseline"))
    assert counts.blocks == pytest.approx(total, rel=0.05)
    assert counts.blocks - counts.idle + counts.head == pytest.approx(active, rel=0.1)
