"""The rows that one rank owns: allocation and layout-independent initial values. Knows nothing of exchange or updates.

Row r is drawn from a counter-based generator (Philox) whose key is the seed and whose counter is the row's place in
the row space: any rank can make any row, the tables are the same for every number of ranks, and no random stream of
the program moves.
"""

import numpy as np
import torch
from torch import Tensor

_VALUES_PER_COUNT = 8  # one Philox count yields four 64-bit words, that is eight float32 draws
_CHUNK_VALUES = 1 << 20  # drawn at a time: stays in cache


def initial_rows(start: int, stop: int, width: int, std: float, seed: int) -> Tensor:
    """Rows [start, stop) of the row space, [stop - start, width] float32: uniform with mean 0 and deviation `std`."""
    if std == 0.0:
        return torch.zeros(stop - start, width)  # pages that are not there until a row is written
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


class TableShard:
    """Rows [start, stop) of the row space, held by one rank; not a module parameter, so no engine sweeps over it.

    weight: [stop - start, width] float32. touched: [stop - start] bool, whether a row was ever updated; changed: the same
    since the last save began.
    """

    def __init__(self, start: int, stop: int, width: int, *, std: float, seed: int, device: torch.device) -> None:
        self.start = start
        self.stop = stop
        self.weight = initial_rows(start, stop, width, std, seed).to(device)
        self.touched = torch.zeros(stop - start, dtype=torch.bool, device=device)
        self.changed = torch.zeros(stop - start, dtype=torch.bool, device=device)

    @property
    def num_rows(self) -> int:
        return self.stop - self.start
