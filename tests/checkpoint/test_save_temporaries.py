"""What a save allocates where the rows are, and only while it looks for changed rows, is bounded whatever the tables' size."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from overtok_megatron.ngram import row_store as table_module
from overtok_megatron.ngram import snapshot as snapshot_module
from overtok_megatron.ngram.row_store import RowStore
from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.parallel.copy_stream import CopyStream


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator computed; empty ones are results, in host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        view = func.is_view or func._schema.is_mutable
        if isinstance(result, torch.Tensor) and not view and func is not torch.ops.aten.empty.memory_format:
            self.elements = max(self.elements, result.numel())
        return result


def shard_with(changed: torch.Tensor, rows: int) -> RowStore:
    shard = RowStore(5, 5 + rows, 4, std=0.02, seed=1, device=torch.device("cpu"))
    shard.flags[changed] = table_module.CHANGED
    return shard


@pytest.mark.parametrize("rows", [1, 99, 100, 101, 1000])
def test_changed_rows_are_found_piece_by_piece(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(table_module, "_FLAGS_AT_ONCE", 100)
    changed = torch.arange(0, rows, 37)
    shard = shard_with(changed, rows)
    with Largest() as largest:
        found = shard.take_changed()
    assert torch.equal(found, changed)
    assert largest.elements <= 100  # the changed rows together are fewer
    assert shard.take_changed().numel() == 0
    assert shard.num_ever_updated() == changed.numel()


def test_changed_rows_leave_the_device_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "PIECE_BYTES", 16 * 10)
    column = torch.randn(500, 4)
    rows = torch.arange(0, 500, 2)
    expected = column[rows]
    snapshot = RowSnapshot({"weight": column}, CopyStream(torch.device("cpu")), rows)
    with Largest() as largest:
        values = snapshot.take(250)["weight"]
    assert torch.equal(values, expected)
    assert largest.elements == 10 * 4
