"""Rows read in place from a checkpoint's files equal loaded rows, however the files are cut; memory does not grow."""

from pathlib import Path

import psutil
import pytest
import torch

from overtok_megatron.checkpoint import tables as tables_module
from overtok_megatron.checkpoint.rows_on_disk import RowsOnDisk
from overtok_megatron.checkpoint.tables import TableWriter
from overtok_megatron.kernels.rows import CHANGED, RowKernels
from support.distributed_harness import run_ranks
from support.expect_error import expect_error
from support.over_tables import WIDTH, make_tables, save_tables, trained_tables


def open_rows(folder: Path, rows: int = 82, width: int = WIDTH) -> RowsOnDisk:
    return RowsOnDisk(folder, rows, width, RowKernels())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("file_bytes", [1 << 29, 300])
def test_rows_on_disk_are_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, file_bytes: int
) -> None:
    monkeypatch.setattr(tables_module, "FILE_BYTES", file_bytes)
    parts = trained_tables(3, dtype=dtype)
    for tables in parts:
        save_tables(tmp_path, tables)
    rows = open_rows(tmp_path)
    for wanted in (torch.float32, torch.bfloat16):
        expected = torch.cat([tables.store.read(torch.arange(tables.store.num_rows), wanted) for tables in parts])
        for index in (torch.arange(82), torch.tensor([0, 1, 27, 28, 54, 55, 81]), torch.tensor([40]), torch.arange(0)):
            read = rows.read(index, wanted)
            assert read.dtype == wanted
            assert torch.equal(read, expected[index])


def test_files_that_do_not_serve(tmp_path: Path) -> None:
    expect_error(lambda: open_rows(tmp_path), "holds 0 of 82 rows")
    (tables,) = trained_tables(1)
    writer = TableWriter(tables, 2)
    (tmp_path / "full").mkdir()
    writer.start_save(tmp_path / "full")()
    expect_error(lambda: open_rows(tmp_path / "full", 84), "holds 82 of 84 rows")
    expect_error(lambda: open_rows(tmp_path / "full", 82, 8), "of width 6", "of width 8")
    tables.store.flags[3] = CHANGED
    (tmp_path / "changed").mkdir()
    writer.start_save(tmp_path / "changed")()
    expect_error(lambda: open_rows(tmp_path / "changed"), "incremental", "overtok checkpoint reshape")
    (path,) = (tmp_path / "full" / "tables").iterdir()
    path.write_bytes(path.read_bytes()[:20])
    expect_error(lambda: open_rows(tmp_path / "full"), "unreadable")


def grown(folder: Path) -> int:
    """Bytes by which a process grows when it reads 20,000 rows spread over a file."""
    rows = open_rows(folder, 2 * 2**20 + 2, 64)
    rows.read(torch.arange(4), torch.float32)
    before = psutil.Process().memory_info().rss
    for turn in range(20):
        rows.read(torch.arange(turn, rows.stop, rows.stop // 1000), torch.float32)
    return int(psutil.Process().memory_info().rss - before)


def test_memory_does_not_grow_with_what_was_read(tmp_path: Path) -> None:
    save_tables(tmp_path, make_tables(table_rows=2**20, width=64, dtype=torch.bfloat16))  # 270 MB
    (growth,) = run_ranks(1, grown, tmp_path)
    assert growth < 20e6
