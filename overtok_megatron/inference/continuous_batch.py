"""A batch that sequences join and leave while the others are being decoded (continuous batching).

All sequences end at the same column of the cache, as in a left-padded batch: one that joins was fed to a decoder of its own,
and its keys and values are copied to the columns before that one; when one leaves, the last sequence takes over its row.
The rows in use are the first ones.

Shapes: k rows in use, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from overtok_megatron.inference.decoder import IncrementalDecoder, Run
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Draw, choose_each

_SLACK = (
    128  # columns before the longest sequence that are tolerated: the cache is moved to the left once in so many steps
)


class ContinuousBatch(IncrementalDecoder):
    """Up to `max_batch` sequences, each of at most the trained context."""

    def __init__(self, trained: TrainedModel, max_batch: int) -> None:
        super().__init__(trained, max_batch, trained.config.data.seq_length + _SLACK)
        self.max_batch = max_batch
        self._used = 0  # rows

    def __len__(self) -> int:
        return self._used

    def join(self, own: IncrementalDecoder) -> None:
        """Add the one sequence that `own` was fed as the last row."""
        assert self._used < self.max_batch
        (length,), end = own.cache.lengths, self._end
        if length > end:
            self.cache.move(self._used, length - end)
        self.cache.copy_row(0, self._used, own.cache, end=max(length, end))
        self._used += 1

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every sequence, in row order: logits [k, V] of what follows."""
        assert len(tokens) == self._used > 0
        spare = self._end - max(self.cache.lengths[: self._used])
        if spare >= _SLACK:
            self.cache.move(self._used, -spare)
        new = torch.tensor(tokens, device=self.trained.device).unsqueeze(1)  # [k, 1]
        return self.feed(new)[:, 0]

    def advance(self, pending: Sequence[int], draws: Sequence[Draw]) -> list[Run]:
        """Append the pending token of every sequence, and choose the one that follows it, in row order."""
        logits = self.step(pending).float()
        chosen = choose_each(logits, draws).tolist()
        return [Run([token], row.unsqueeze(0)) for token, row in zip(chosen, logits, strict=True)]

    def leave(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        self._used -= 1
        if row != self._used:
            self.cache.copy_row(self._used, row)
        self.cache.clear_row(self._used)

    @property
    def _end(self) -> int:
        """The column before which all sequences end."""
        return max(self.cache.ends[: self._used], default=0)
