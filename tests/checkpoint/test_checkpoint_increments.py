"""Saves that go on while rows change, and saves of changed rows alone: what comes back is the moment of the save."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overtok_megatron.checkpoint import tables as tables_module
from overtok_megatron.checkpoint.tables import TableWriter, load_tables, merged_rows, table_files, write_rows
from overtok_megatron.ngram import snapshot as snapshot_module
from overtok_megatron.ngram.sharded_tables import ShardedTables
from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.parallel.copy_stream import CopyStream
from support.over_tables import columns, make_tables


def train_rows(tables: ShardedTables, rows: list[int], seed: int) -> None:
    """A training step in which these rows are looked up, once each, with random gradients."""
    fetched = tables.fetch_row_ids(torch.tensor(rows), training=True)
    gathered = fetched.gather()
    gathered.backward(torch.randn(gathered.shape, generator=torch.Generator().manual_seed(seed)))
    tables.update_rows(tables.reduce_gradients(fetched, 1.0), 0.1, 1.0)


def copies(parts: list[ShardedTables]) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in columns(parts).items()}


def check_loads(folder: Path, expected: dict[str, Tensor], readers: int, steps: int) -> None:
    read = [make_tables(rank=rank, ranks=readers) for rank in range(readers)]
    for tables in read:
        load_tables(folder, tables)
        assert tables.optimizer.steps == steps
    for name, values in columns(read).items():
        assert torch.equal(values, expected[name]), name


@settings(deadline=None, max_examples=60)
@given(
    cuts=st.lists(st.integers(0, 30), max_size=4),
    changes=st.lists(st.sets(st.integers(0, 29), max_size=12), min_size=5, max_size=5),
)
def test_a_snapshot_is_one_moment(cuts: list[int], changes: list[set[int]]) -> None:
    live = {"weight": torch.randn(30, 3), "state": torch.randn(30), "flag": torch.zeros(30, dtype=torch.bool)}
    before = {name: column.clone() for name, column in live.items()}
    snapshot = RowSnapshot(live, CopyStream(torch.device("cpu")))
    parts = []
    for turn, end in enumerate([*sorted(cuts), 30]):
        rows = torch.tensor(sorted(changes[turn]), dtype=torch.int64)
        snapshot.preserve(rows)
        live["weight"][rows] += 1.0
        live["state"][rows] -= 1.0
        live["flag"][rows] = True
        parts.append(snapshot.take(end))
    for name, column in before.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), column)


def test_a_save_writes_the_moment_that_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "FILE_BYTES", 600)
    monkeypatch.setattr(snapshot_module, "PIECE_BYTES", 100)
    tables = make_tables(std=1.0)
    train_rows(tables, list(range(0, 82, 3)), seed=0)
    expected = copies([tables])
    write = TableWriter(tables, 0).start_save(tmp_path)
    slow, real = threading.Event(), write_rows

    def slowly(*arguments: object) -> object:
        slow.wait(0.02)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tables_module, "write_rows", slowly)
    thread = threading.Thread(target=write)
    thread.start()
    for turn in range(200):
        train_rows(tables, list(range(turn % 5, 82, 5)), seed=turn)
    thread.join()
    assert len(list((tmp_path / "tables").iterdir())) > 5
    assert tables.snapshot is None
    check_loads(tmp_path, expected, readers=1, steps=1)


@pytest.mark.parametrize("writers", [1, 3])
def test_increments_build_on_each_other_and_start_anew(tmp_path: Path, writers: int) -> None:
    parts = [make_tables(rank=rank, ranks=writers, std=1.0) for rank in range(writers)]
    savers = [TableWriter(tables, 2) for tables in parts]
    kinds, folders, expected = [], [], []
    for turn in range(6):
        for tables in parts:
            rows = range(tables.store.num_rows) if turn == 4 else range(turn % 4, tables.store.num_rows, 4)
            train_rows(tables, list(rows), seed=turn)
        folder = tmp_path / f"step_{turn}"
        partial = tmp_path / f"step_{turn}.partial"
        partial.mkdir()
        names = {name for saver in savers for name in saver.start_save(partial)()}
        partial.rename(folder)
        for saver in savers:
            saver.published(folder)
        assert names == {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
        kinds.append(max(file.increment for file in table_files(folder)))
        folders.append(folder)
        expected.append(copies(parts))
    # the fourth is full because two may build on one, the fifth because most rows had changed
    assert kinds == [0, 1, 2, 0, 0, 1]
    for old in folders[:2]:
        for path in sorted(old.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    for turn in range(2, 6):
        for readers in (1, 2, 5):
            check_loads(folders[turn], expected[turn], readers, steps=turn + 1)


def test_a_save_after_a_failed_one_is_full(tmp_path: Path) -> None:
    tables = make_tables(std=1.0)
    writer = TableWriter(tables, 5)
    for name in "abc":
        (tmp_path / name).mkdir()
    writer.start_save(tmp_path / "a")()
    train_rows(tables, [3], seed=0)
    writer.start_save(tmp_path / "b")
    writer.forget()
    train_rows(tables, [5], seed=1)
    writer.start_save(tmp_path / "c")()
    assert [file.is_full for file in table_files(tmp_path / "c")] == [True]
    check_loads(tmp_path / "c", copies([tables]), readers=1, steps=2)


def test_merging_gives_full_files(tmp_path: Path) -> None:
    tables = make_tables(std=1.0)
    writer = TableWriter(tables, 5)
    for turn in range(3):
        folder = tmp_path / str(turn)
        folder.mkdir()
        train_rows(tables, list(range(turn, 82, 7)), seed=turn)
        writer.start_save(folder)()
    merged = tmp_path / "merged"
    merged.mkdir()
    for file, values, steps in merged_rows(tmp_path / "2"):
        write_rows(merged, file, values, steps)
    assert all(file.is_full for file in table_files(merged))
    check_loads(merged, copies([tables]), readers=2, steps=3)


def test_an_increment_is_small(tmp_path: Path) -> None:
    tables = make_tables(std=1.0, table_rows=5000)
    writer = TableWriter(tables, 5)
    sizes = []
    for name in "ab":
        (tmp_path / name).mkdir()
        files = writer.start_save(tmp_path / name)()
        last = table_files(tmp_path / name)[-1]
        sizes.append(files[last.name][0])
        train_rows(tables, list(range(0, 10_000, 100)), seed=0)
    assert sizes[1] < 0.03 * sizes[0]
