"""The rows of a shard as they were at one moment, handed out piece by piece while training goes on changing them.

Copy on write in software: whoever changes rows first lets the snapshot keep their old values, once a row and only of rows that
were not handed out yet. A snapshot therefore costs nothing when it is made. While it is read it takes host memory by what
changes, and one flag per row where the rows are.
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
    """columns: name -> tensor [rows, ...], live; pieces are taken in ascending order of rows, by another thread."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self._columns = columns
        self._begin = 0
        self._lock = threading.Lock()
        any_column = next(iter(columns.values()))
        self._kept_flags = torch.zeros(any_column.shape[0], dtype=torch.bool, device=any_column.device)
        self._kept: list[tuple[Tensor, dict[str, Tensor]]] = []

    def preserve(self, rows: Tensor) -> None:
        """Keep the values of `rows` [r] int64, distinct and ascending, which are about to change."""
        with self._lock:
            ahead = rows[(rows >= self._begin) & ~self._kept_flags[rows]]
            if ahead.numel():
                self._kept_flags[ahead] = True
                values = {name: to_host(column[ahead]) for name, column in self._columns.items()}
                self._kept.append((to_host(ahead), values))

    def take(self, end: int) -> dict[str, Tensor]:
        """The next rows, up to `end`, as CPU tensors."""
        with self._lock:
            begin, self._begin = self._begin, end
            part = {name: column[begin:end].to("cpu", copy=True) for name, column in self._columns.items()}
            # the copies above waited for the device, so what `preserve` sent to the host before them is there
            edges = torch.tensor([begin, end])
            for rows, values in self._kept:
                first, last = torch.searchsorted(rows, edges).tolist()
                place = rows[first:last] - begin
                for name, old in values.items():
                    part[name][place] = old[first:last]
            self._kept = [(rows, values) for rows, values in self._kept if int(rows[-1]) >= end]
            return part
