"""Dropout of n-gram look-ups: in training, some (position, table) contributions are left out and the others are scaled up.

Tables learn rare n-grams by heart: from the second epoch on a model would rely on rows that were trained on the very sample
that it reads. Which look-ups are dropped is a pure function of the seed, the step, the sample's place in the global batch,
the position and the table: it is the same in every layout, in recomputation and after a resume. A dropped look-up's row takes
part in the step with a gradient of zero.

Shapes: A micro-batches, b batch, s_lookup the positions that this rank looks up, T tables.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from overtok_megatron.kernels.rows import noise, noise_key


@dataclass(frozen=True, kw_only=True)
class LookupDropout:
    """Makes the factors of a step's look-ups, on `device`.

    rates: of each table [T], the probability with which a look-up is dropped, in [0, 1). seed: a stream of its own.
    seq_length: of whole samples, with the further tokens whose n-grams heads read. positions: the first position of each sample
    that this rank looks up for its slice of the sequence, and their number.
    micro_batch_size: b. data_rank, data_ranks: which samples of the global batch this rank's copy of the model has.
    """

    rates: tuple[float, ...]
    seed: int
    seq_length: int
    positions: tuple[int, int]
    micro_batch_size: int
    data_rank: int
    data_ranks: int
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def _thresholds(self) -> Tensor:
        """[T] int64: a look-up whose 32 random bits are below its table's is dropped."""
        return torch.tensor([round(rate * 2**32) for rate in self.rates], dtype=torch.int64, device=self.device)

    @cached_property
    def _kept(self) -> Tensor:
        """[T] in the model's dtype: the factor of a look-up that is kept."""
        return torch.tensor([1.0 / (1.0 - rate) for rate in self.rates], dtype=self.dtype, device=self.device)

    def factors(self, step: int, num_micro_batches: int, *, overlap: int = 0) -> Tensor:
        """[A, b, s_lookup, T] in the model's dtype: 0 for a look-up that is dropped, else 1 / (1 - its table's rate).

        step: how many optimizer steps were taken before this one. overlap: how many positions beyond its slice this rank looks
        up, for heads. Nothing here waits for the device.
        """
        start, count = self.positions
        batch = torch.arange(self.micro_batch_size, device=self.device)
        micro_batch = torch.arange(num_micro_batches, device=self.device) * self.data_ranks + self.data_rank
        sample = micro_batch.unsqueeze(1) * self.micro_batch_size + batch  # [A, b], the place in the global batch
        position = torch.arange(start, start + count + overlap, device=self.device)
        ids = sample.unsqueeze(-1) * self.seq_length + position  # [A, b, s_lookup]
        bits = noise(noise_key(self.seed, step), ids.flatten(), 0, len(self.rates)).view(*ids.shape, len(self.rates))
        return torch.where(bits < self._thresholds, 0.0, self._kept)
