"""The rows of one rank as they were at one moment, read piece by piece by a save while training goes on changing them.

Copy on write. Before a step changes rows, `preserve` copies their values to host memory. The thread of a save reads all rows
meanwhile, whatever they hold by then, and puts the values that were preserved over those that had changed. For each row the
first copy counts: every change of a row is preceded by a copy, so the first copy holds what the row was at the moment of the
snapshot, and without a copy the row itself does.

On a GPU both threads only ask for work, in two streams that know nothing of each other. This is right all the same, because
`preserve` lists its copies before the update is launched, and `take` looks at the list after its reads have been made: an
update that may have overtaken a read is in the list. So the training thread waits neither for the device nor for the disk, its
stream waits for no read, and nobody holds a lock while it copies or waits.

Memory: on the device the values of the rows of one step, while they are copied, and for a part of the rows their numbers (8
bytes each) and two pieces. In host memory, pinned beside a GPU: two pieces, and copies that were not sorted yet, up to
_UNSORTED_BYTES and one step's; not pinned: one byte per row, and at most one value of each row that changed before it was read.
torch rounds pinned buffers up to powers of two and keeps them for the next save.
"""

import math
import threading
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from overtok_megatron.parallel.copy_stream import CopyStream, Mark

PIECE_BYTES = 1 << 24  # of each of the two buffers through which rows go
_UNSORTED_BYTES = 1 << 28  # of copies that wait for the save's thread; what is beyond, the training thread sorts itself


class _Preserved(NamedTuple):
    """Local rows [r] int64, ascending, and their values [r, ...] by column, in host memory when `copied` has come."""

    rows: Tensor
    values: dict[str, Tensor]
    copied: Mark

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + sum(value.nbytes for value in self.values.values())


class RowSnapshot:
    """The rows of `columns` at the moment of construction: name -> tensor [m, ...], which training goes on changing.

    rows: local rows [c] int64, distinct and ascending, where the columns are; only these are read. None = all m rows. They are
    numbered 0 .. count by their order, and take `row_bytes` each. stream: of the device where the columns are. One thread
    changes rows, and calls the constructor, and `preserve` before each change; another one calls `take`.
    """

    def __init__(self, columns: dict[str, Tensor], stream: CopyStream, rows: Tensor | None = None) -> None:
        self._columns = columns
        self._stream = stream
        self._rows = rows
        stream.follow_compute()
        self.host_rows = None if rows is None else stream.to_host(rows)  # there when `take` has returned
        self.count = next(iter(columns.values())).shape[0] if rows is None else rows.shape[0]
        self.row_bytes = sum(column.dtype.itemsize * math.prod(column.shape[1:]) for column in columns.values())
        self._rows_per_piece = max(1, min(PIECE_BYTES // self.row_bytes, self.count))
        self._buffers: list[dict[str, Tensor]] = []
        self._lock = threading.Lock()  # of the next two
        self._unsorted: deque[_Preserved] = deque()
        self._unsorted_bytes = 0
        self._sorting = threading.Lock()  # of the next three
        self._taken = 0
        self._is_kept = torch.zeros(self.count, dtype=torch.bool)
        self._kept: list[tuple[Tensor, dict[str, Tensor]]] = []  # (numbers, ascending, values) of rows not taken yet

    def preserve(self, local_rows: Tensor) -> None:
        """Keep the values of local_rows [r] int64, distinct and ascending, which are about to change.

        The change must be launched afterwards in the calling thread's current stream; nobody may change `local_rows`.
        """
        if self._taken == self.count or local_rows.shape[0] == 0:
            return
        values = {name: column.index_select(0, local_rows) for name, column in self._columns.items()}
        self._stream.follow_compute()
        values = {name: self._stream.to_host(value) for name, value in values.items()}
        preserved = _Preserved(self._stream.to_host(local_rows), values, self._stream.mark())
        with self._lock:
            self._unsorted.append(preserved)
            self._unsorted_bytes += preserved.nbytes
        self._sort_surplus()

    def take(self, end: int) -> dict[str, Tensor]:
        """The rows with the numbers from the last call's end (at first 0) up to `end`, as CPU tensors, not pinned."""
        begin = self._taken
        result = {
            name: torch.empty(end - begin, *column.shape[1:], dtype=column.dtype)
            for name, column in self._columns.items()
        }
        if not self._buffers:
            self._buffers = [
                {name: self._stream.buffer(column, self._rows_per_piece) for name, column in self._columns.items()}
                for _ in range(2)
            ]
        before: tuple[int, int, Mark] | None = None  # the piece that is read while the next one is asked for
        for first in range(begin, end, self._rows_per_piece):
            last = min(first + self._rows_per_piece, end)
            done = self._read(first, last)
            if before is not None:
                self._move(*before, result, begin)
            before = first, last, done
        if before is not None:
            self._move(*before, result, begin)
        self._restore(begin, end, result)
        return result

    def _read(self, first: int, last: int) -> Mark:
        """Ask for the rows [first, last) in one of the buffers."""
        for name, target in self._buffer_of(first, last).items():
            column = self._columns[name]
            if self._rows is None:
                self._stream.read(target, column[first:last])
            else:
                self._stream.read_entries(target, column, self._rows[first:last])
        return self._stream.mark()

    def _buffer_of(self, first: int, last: int) -> dict[str, Tensor]:
        return {
            name: buffer[: last - first] for name, buffer in self._buffers[first // self._rows_per_piece % 2].items()
        }

    def _move(self, first: int, last: int, done: Mark, result: dict[str, Tensor], begin: int) -> None:
        """Wait for the rows [first, last), and move them into the result, whose first row is `begin`."""
        done.synchronize()
        for name, buffer in self._buffer_of(first, last).items():
            result[name][first - begin : last - begin] = buffer

    def _restore(self, begin: int, end: int, result: dict[str, Tensor]) -> None:
        """Put what was preserved of the rows [begin, end) over what was read of them."""
        with self._sorting:
            # Copies of steps that come from now on are not waited for: their updates overtook no read of this range.
            for _ in range(len(self._unsorted)):
                preserved = self._next_unsorted()
                preserved.copied.synchronize()
                self._sort(preserved)
            edges = torch.tensor([begin, end])
            for numbers, values in self._kept:
                first, last = torch.searchsorted(numbers, edges).tolist()
                index = numbers[first:last] - begin
                for name, old in values.items():
                    result[name][index] = old[first:last]
            self._kept = [(numbers, values) for numbers, values in self._kept if int(numbers[-1]) >= end]
            self._taken = end

    def _sort_surplus(self) -> None:
        """Sort copies beyond what may wait for the save's thread, where they have been made and that thread is not sorting."""
        if self._unsorted_bytes > _UNSORTED_BYTES and self._sorting.acquire(blocking=False):
            try:
                while self._unsorted_bytes > _UNSORTED_BYTES and self._unsorted[0].copied.query():
                    self._sort(self._next_unsorted())
            finally:
                self._sorting.release()

    def _next_unsorted(self) -> _Preserved:
        with self._lock:
            preserved = self._unsorted.popleft()
            self._unsorted_bytes -= preserved.nbytes
            return preserved

    def _sort(self, preserved: _Preserved) -> None:
        """Keep those of the copies that are the first of their row, of rows that were not taken yet."""
        numbers = preserved.rows
        wanted = torch.ones(len(numbers), dtype=torch.bool)
        if self.host_rows is not None:
            numbers = torch.searchsorted(self.host_rows, preserved.rows).clamp_(max=self.count - 1)
            wanted = self.host_rows[numbers] == preserved.rows
        wanted &= (numbers >= self._taken) & ~self._is_kept[numbers]
        (index,) = wanted.nonzero(as_tuple=True)
        if len(index):
            numbers = numbers[index]
            self._is_kept[numbers] = True
            self._kept.append((numbers, {name: value[index] for name, value in preserved.values.items()}))
