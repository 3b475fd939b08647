"""The rows that one rank owns: allocation and layout-independent initial values. Exchange and updates are elsewhere.

Row r is drawn from a counter-based generator (Philox) whose key is the seed and whose counter follows from the row id r: any
rank can make any row, the tables are the same for every number of ranks, and no other random stream moves.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from overtok_megatron.kernels.rows import CHANGED, EVER_UPDATED, RowKernels, StoredRows, round_int8

_VALUES_PER_COUNT = 8  # one Philox count yields four 64-bit words, that is eight float32 draws
_CHUNK_VALUES = 1 << 20  # how many values are drawn at a time: they stay in cache
_FLAGS_AT_ONCE = 1 << 24  # how many flags are read at a time, so that no temporary tensor grows with the tables


def initial_rows(start: int, stop: int, width: int, std: float, seed: int) -> Tensor:
    """Rows [start, stop) of the row space, [stop - start, width] float32: uniform with mean 0 and deviation `std`."""
    result = torch.empty((stop - start) * width, dtype=torch.float32)
    flat = result.numpy()
    span = std * 12**0.5  # a uniform distribution of this width has deviation std
    first = start * width
    for begin in range(0, flat.size, _CHUNK_VALUES):
        end = min(begin + _CHUNK_VALUES, flat.size)
        count, skip = divmod(first + begin, _VALUES_PER_COUNT)
        bits = np.random.Philox(key=seed, counter=count)
        draws = np.random.Generator(bits).random(end - begin + skip, dtype=np.float32)[skip:]
        np.subtract(draws, np.float32(0.5), out=draws)
        np.multiply(draws, np.float32(span), out=flat[begin:end])
    return result.view(stop - start, width)


class RowReader(Protocol):
    """Rows [start, stop) of the row space, wherever they lie; `rows` is None where they are not in memory as tensors."""

    start: int
    stop: int
    kernels: RowKernels

    @property
    def rows(self) -> StoredRows | None: ...

    @property
    def device(self) -> torch.device: ...

    def read(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Local rows index [r] int64, ascending -> [r, width] of a dtype."""


class RowStore:
    """Rows [start, stop) of the row space, owned by one rank. Not a module parameter, so that no engine sweeps over them.

    rows: their values, of dtype float32, bfloat16, or int8 with a scale per row. flags [stop - start] uint8: 0 for a row that
    was never updated, else EVER_UPDATED, or CHANGED if that was also since the last save began. The flags are the column
    "touched" of a checkpoint.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        width: int,
        *,
        std: float,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        kernels: RowKernels | None = None,
    ) -> None:
        self.start = start
        self.stop = stop
        self.kernels = kernels or RowKernels()
        # zeros() maps pages lazily: unwritten rows take no memory
        weight = torch.zeros(stop - start, width, dtype=dtype, device=device)
        scale = torch.zeros(stop - start, device=device) if dtype == torch.int8 else None
        self.flags = torch.zeros(stop - start, dtype=torch.uint8, device=device)
        self.rows = StoredRows(weight, scale, start, self.flags)
        chunk = max(1, _CHUNK_VALUES // width)
        for begin in range(start, stop if std > 0.0 else start, chunk):
            end = min(begin + chunk, stop)
            self._fill(begin - start, initial_rows(begin, end, width, std, seed))

    def _fill(self, begin: int, values: Tensor) -> None:
        part = slice(begin, begin + values.shape[0])
        if self.rows.scale is not None:
            values, scale = round_int8(values, torch.full(values.shape, 2**31))  # bits of 0.5: to nearest
            self.rows.scale[part] = scale.to(self.rows.scale.device)
        self.rows.weight[part] = values.to(self.rows.weight.device)

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def device(self) -> torch.device:
        return self.rows.weight.device

    def read(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Local rows index [r] int64 -> [r, width] of a dtype."""
        return self.kernels.read(self.rows, index, dtype)

    def columns(self) -> dict[str, Tensor]:
        """The stored values by name: tensors with one entry per local row."""
        scale = {} if self.rows.scale is None else {"scale": self.rows.scale}
        return {"weight": self.rows.weight, **scale, "touched": self.flags}

    def num_ever_updated(self) -> int:
        """How many rows were ever updated."""
        return int(self.flags.count_nonzero())

    def take_changed(self) -> Tensor:
        """Local rows [c] int64, ascending, that were updated since this or `forget_changed` was last called.

        Waits for the device, once for every _FLAGS_AT_ONCE rows, because nobody knows before how many rows have changed.
        """
        parts = []
        for begin in range(0, self.num_rows, _FLAGS_AT_ONCE):
            flags = self.flags[begin : begin + _FLAGS_AT_ONCE]
            parts.append((flags == CHANGED).nonzero().squeeze(1) + begin)
        self.forget_changed()
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self.device)

    def forget_changed(self) -> None:
        """Let no row count as changed since the last save."""
        self.flags.clamp_(max=EVER_UPDATED)
