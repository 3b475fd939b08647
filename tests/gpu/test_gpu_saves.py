"""Rows of a GPU that are saved while it changes them: the file's are those of one moment, and no step waits."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.parallel.copy_stream import CopyStream, stream_of_thread
from overtok_megatron.parallel.devices import make_current

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda", 0)


@contextmanager
def no_waits() -> Iterator[None]:
    """torch raises where an operator of any thread waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("selected", [False, True])
def test_one_moment_on_a_gpu(selected: bool) -> None:
    count = 2_000_000
    columns = {
        "weight": torch.randn(count, 64, device=CUDA).bfloat16(),
        "state": torch.randn(count, device=CUDA),
        "touched": torch.zeros(count, dtype=torch.uint8, device=CUDA),
    }
    rows = torch.arange(0, count, 3, device=CUDA) if selected else None
    changed = [torch.arange(turn, count, 41, device=CUDA) for turn in range(41)]
    for turn in (40, 39):  # the device still has work to do when the moment comes
        columns["state"].index_fill_(0, changed[turn], turn)
    expected = {name: column.clone() if rows is None else column[rows] for name, column in columns.items()}
    snapshot = RowSnapshot(columns, CopyStream(CUDA), rows)
    taken: list[dict[str, Tensor]] = []

    def save() -> None:
        make_current(CUDA)
        with stream_of_thread(CUDA):
            taken.extend(snapshot.take(end) for end in (snapshot.count // 3, snapshot.count))

    thread = threading.Thread(target=save)
    with no_waits():
        thread.start()
        for turn in range(200):
            step_rows = changed[turn % 41]
            snapshot.preserve(step_rows)
            columns["weight"].index_fill_(0, step_rows, turn)
            columns["state"].index_fill_(0, step_rows, turn)
            columns["touched"].index_fill_(0, step_rows, 3)
        thread.join()
    for name, values in expected.items():
        assert torch.equal(torch.cat([part[name] for part in taken]), values.cpu()), name
