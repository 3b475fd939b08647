"""The order of samples: a shuffle of each epoch that depends on the seed alone, never on the world size.

Epochs of up to 2^24 samples are shuffled by numpy and kept, 128 MiB at most. Longer ones would cost each rank gigabytes and
a minute per epoch: there a keyed permutation computes where each sample goes on its own.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from overtok_megatron.errors import DataError

_KEPT = 1 << 24  # samples of an epoch; part of the order, so that it never changes
_ROUNDS = 6


class SampleOrder:
    """Where samples begin: at stride seq_length over a stream, in an order drawn anew for each epoch.

    A sample has seq_length tokens and at least one more behind them; batches.py knows how many are read.
    Sample i (0, 1, ... without end) belongs to epoch i // samples_per_epoch. The position in the data is this one number.
    """

    def __init__(self, num_tokens: int, seq_length: int, seed: int, name: str) -> None:
        self.seq_length = seq_length
        self.seed = seed
        self.samples_per_epoch = (num_tokens - 1) // seq_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{name}: {num_tokens} tokens, too few for one sample of data.seq_length {seq_length} and "
                "its last target; shorten it or add text"
            )
        self._permutation = lru_cache(maxsize=2)(self._draw)  # a step may straddle two epochs
        self._keys = lru_cache(maxsize=2)(self._draw_keys)

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.samples_per_epoch)

    def _draw_keys(self, epoch: int) -> tuple[int, ...]:
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        return tuple(generator.integers(0, 2**63, _ROUNDS).tolist())

    def offset(self, sample: int) -> int:
        """First token of a sample in the stream."""
        epoch, index = divmod(sample, self.samples_per_epoch)
        if self.samples_per_epoch > _KEPT:
            return permuted(index, self.samples_per_epoch, self._keys(epoch)) * self.seq_length
        return int(self._permutation(epoch)[index]) * self.seq_length


def permuted(index: int, size: int, keys: tuple[int, ...]) -> int:
    """The image of `index` under a permutation of 0 .. size - 1 that `keys` choose, in constant time and memory.

    A Feistel network permutes the numbers of the next even count of bits; a number that it maps outside the range goes through
    it again until it is inside (cycle walking; fewer than four times on average).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mixed(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the result depends on every bit of the value."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
