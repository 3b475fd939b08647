"""Which sample comes when: a shuffle of each epoch that depends on the seed alone, never on the world size."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from overtok_megatron.errors import DataError


class SampleOrder:
    """Samples of seq_length + 1 tokens at stride seq_length over a stream, in an order drawn anew for each epoch.

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

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.samples_per_epoch)

    def offset(self, sample: int) -> int:
        """First token of a sample in the stream."""
        epoch, index = divmod(sample, self.samples_per_epoch)
        return int(self._permutation(epoch)[index]) * self.seq_length
