"""The rows of one rank as they were at one moment, read piece by piece by a save while training goes on changing them.

Copy on write: before rows change, `preserve` keeps their old values, at most once per row and only of rows that were not read
yet. Making a snapshot therefore copies nothing. While it is read, it takes host memory for the rows that change meanwhile, and
one flag per row where the rows lie.
"""

import threading

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory. From a GPU it is copied into pinned memory, without waiting for the copy."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class RowSnapshot:
    """columns: name -> tensor [rows, ...], which training goes on changing.

    One thread takes the rows in ascending order (`take`), another one changes rows and calls `preserve` before.
    """

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self._columns = columns
        self._next_row = 0  # the first local row that was not taken yet
        self._lock = threading.Lock()
        any_column = next(iter(columns.values()))
        self._is_kept = torch.zeros(any_column.shape[0], dtype=torch.bool, device=any_column.device)
        self._kept: list[tuple[Tensor, dict[str, Tensor]]] = []

    def preserve(self, local_rows: Tensor) -> None:
        """Keep the values of local_rows [r] int64, distinct and ascending, which are about to change."""
        with self._lock:
            not_taken = local_rows[(local_rows >= self._next_row) & ~self._is_kept[local_rows]]
            if not_taken.numel():
                self._is_kept[not_taken] = True
                values = {name: to_host(column[not_taken]) for name, column in self._columns.items()}
                self._kept.append((to_host(not_taken), values))

    def take(self, end: int) -> dict[str, Tensor]:
        """The local rows from the last call's end (at first 0) up to `end`, as CPU tensors."""
        with self._lock:
            begin, self._next_row = self._next_row, end
            part = {name: column[begin:end].to("cpu", copy=True) for name, column in self._columns.items()}
            # The copies above waited for the device, so the copies to the host that `preserve` began before have ended.
            edges = torch.tensor([begin, end])
            for rows, values in self._kept:
                first, last = torch.searchsorted(rows, edges).tolist()
                index = rows[first:last] - begin
                for name, old in values.items():
                    part[name][index] = old[first:last]
            self._kept = [(rows, values) for rows, values in self._kept if int(rows[-1]) >= end]
            return part
