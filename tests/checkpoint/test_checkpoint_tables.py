"""Rows and weights written by some ranks come back bit for bit on any other number; what does not fit is named."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from overtok_megatron.checkpoint import tables as tables_module
from overtok_megatron.checkpoint.dense import dense_files, read_parts, save_dense
from overtok_megatron.checkpoint.tables import load_rows, load_tables
from support.expect_error import expect_error
from support.over_tables import WIDTH, columns, make_tables, save_tables, trained_tables

CPU = torch.device("cpu")


@pytest.mark.parametrize("readers", [1, 2, 5])
@pytest.mark.parametrize("file_bytes", [1 << 29, 500, 1])
@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad", "sgd"])
def test_any_number_of_ranks_reads_what_three_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers: int, file_bytes: int, optimizer: str
) -> None:
    monkeypatch.setattr(tables_module, "FILE_BYTES", file_bytes)
    dtype = torch.bfloat16 if file_bytes == 500 else torch.float32
    written = trained_tables(3, optimizer=optimizer, state_dtype=dtype)
    names = [name for tables in written for name in save_tables(tmp_path, tables)]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == names
    if file_bytes == 1 << 29:
        assert len(names) == 3
    elif file_bytes == 1:
        assert len(names) == 82  # one row per file
    else:
        assert 6 <= len(names) < 82
        row_bytes = sum(tensor[:1].nbytes for tensor in columns(written).values())
        for name in names:
            with safe_open(tmp_path / name, framework="pt") as file:
                assert file.get_slice("weight").get_shape()[0] * row_bytes <= 500
    read = [make_tables(rank=rank, ranks=readers, optimizer=optimizer, state_dtype=dtype) for rank in range(readers)]
    for tables in read:
        load_tables(tmp_path, tables)
        assert tables.optimizer.steps == 3
        assert tables.optimizer.rows is tables.store.rows  # filled in place
    expected = columns(written)
    assert expected["touched"].any()
    assert not expected["touched"].all()
    for name, values in columns(read).items():
        assert values.dtype == expected[name].dtype
        assert torch.equal(values, expected[name]), name


def test_more_ranks_than_rows(tmp_path: Path) -> None:
    written = trained_tables(5, table_rows=1)  # 4 rows: the last rank owns none
    assert save_tables(tmp_path, written[4]) == []
    for tables in written[:4]:
        assert len(save_tables(tmp_path, tables)) == 1
    for readers in (1, 7):
        read = [make_tables(rank=rank, ranks=readers, table_rows=1) for rank in range(readers)]
        for tables in read:
            load_tables(tmp_path, tables)
        assert torch.equal(columns(read)["weight"], columns(written)["weight"])


def test_training_goes_on_alike(tmp_path: Path) -> None:
    (tables,) = trained_tables(1)
    save_tables(tmp_path, tables)
    fresh = make_tables()
    load_tables(tmp_path, fresh)
    rows, grad = torch.arange(0, 82, 2), torch.randn(41, WIDTH)
    for each in (tables, fresh):
        each.optimizer.update(rows, grad, 0.1)
    for name, values in columns([fresh]).items():
        assert torch.equal(values, columns([tables])[name]), name


def test_rows_without_their_optimizer(tmp_path: Path) -> None:
    (written,) = trained_tables(1)
    save_tables(tmp_path, written)
    read = make_tables(optimizer="sgd")  # generation reads rows alone, whatever optimizer trained them
    load_rows(tmp_path, read.store)
    assert torch.equal(read.store.rows.weight, written.store.rows.weight)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_missing_rows_are_found(tmp_path: Path, lost: int) -> None:
    names = [name for tables in trained_tables(3) for name in save_tables(tmp_path, tables)]
    (tmp_path / names[lost]).unlink()
    held = 82 - [28, 27, 27][lost]
    whole = f"holds {held} of the rows 0 to 82"
    expect_error(lambda: load_tables(tmp_path, make_tables()), str(tmp_path / "tables"), whole)
    for rank in range(3):
        own = make_tables(rank=rank, ranks=3)
        if rank == lost:
            expect_error(lambda: load_tables(tmp_path, own), "holds 0 of the rows")  # noqa: B023  # at once
        else:
            load_tables(tmp_path, own)


def test_no_files_and_larger_tables(tmp_path: Path) -> None:
    expect_error(lambda: load_tables(tmp_path, make_tables()), "holds 0 of the rows 0 to 82")
    save_tables(tmp_path, make_tables())
    larger = make_tables(table_rows=50)
    expect_error(lambda: load_tables(tmp_path, larger), "holds 82 of the rows 0 to 102", "other tables")


@pytest.mark.parametrize("width", [4, 8])
def test_another_width_is_named(tmp_path: Path, width: int) -> None:
    names = save_tables(tmp_path, make_tables())
    other = make_tables(width=width)
    message = f"rows of shape [6], this model needs [{width}]"
    expect_error(lambda: load_tables(tmp_path, other), names[0], "weight", message)


@pytest.mark.parametrize(
    ("written", "wanted", "state"),
    [("adam", "rowwise_adagrad", "square_sum"), ("sgd", "adam", "exp_avg"), ("rowwise_adagrad", "adam", "exp_avg")],
)
def test_another_optimizer_is_named(tmp_path: Path, written: str, wanted: str, state: str) -> None:
    names = save_tables(tmp_path, make_tables(optimizer=written))
    other = make_tables(optimizer=wanted)
    message = f"holds no {state}; over_encoding.optimizer differs"
    expect_error(lambda: load_tables(tmp_path, other), names[0], message)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "header":
        path.write_bytes(content[:8] + b"\xff" + content[9:])
    else:
        save_file({"weight": torch.zeros(82, WIDTH)}, path)  # somebody's, without our metadata


@pytest.mark.parametrize("kind", ["cut", "empty", "header", "foreign"])
def test_damaged_files_are_named(tmp_path: Path, kind: str) -> None:
    (name,) = save_tables(tmp_path, make_tables())
    damage(tmp_path / name, kind)
    expect_error(lambda: load_tables(tmp_path, make_tables()), str(tmp_path / name), "unreadable")
    name = save_dense(tmp_path, {"weight": torch.ones(82, WIDTH)}, {}, 0, 1)
    damage(tmp_path / name, kind)
    expect_error(lambda: dict(read_parts(tmp_path, 1)), str(tmp_path / name), "unreadable")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_split_weights_are_joined(tmp_path: Path, ranks: int) -> None:
    whole = {
        "rows": torch.randn(5, 3),
        "columns": torch.randn(4, 7).bfloat16(),
        "split_norm": torch.randn(8),
        "norm": torch.randn(3),
        "more_ranks_than_rows": torch.randn(2, 3),
    }
    splits = {"rows": 0, "columns": 1, "split_norm": 0, "more_ranks_than_rows": 0}
    for rank in range(ranks):
        state = {
            name: weight.tensor_split(ranks, dim=splits[name])[rank] if name in splits else weight
            for name, weight in whole.items()
        }
        assert save_dense(tmp_path, state, splits, rank, ranks) == dense_files(ranks)[rank]
    loaded = dict(read_parts(tmp_path, ranks))
    assert loaded.keys() == whole.keys()
    for name, weight in whole.items():
        assert loaded[name].dtype == weight.dtype
        assert torch.equal(loaded[name], weight), name


def test_a_lost_shard_of_the_weights_is_named(tmp_path: Path) -> None:
    for rank in range(2):
        save_dense(tmp_path, {"rows": torch.ones(2, 2)}, {"rows": 0}, rank, 2)
    (tmp_path / dense_files(2)[1]).unlink()
    expect_error(lambda: dict(read_parts(tmp_path, 2)), dense_files(2)[1])
