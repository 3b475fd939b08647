"""A batch that sequences join and leave while the others are being decoded (continuous batching).

All sequences end at the same column of the cache, as in a left-padded batch: one that joins was fed to a decoder of its own,
and its keys and values are copied before that column; one that leaves gives its row to the last. Rows in use are the first.
Shapes: k rows in use, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from overtok_megatron.inference.generation import Decoder
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.ngram.ids import MISSING

_SLACK = 128  # columns behind the longest sequence before the cache is moved: what is moved is then moved seldom


class ContinuousBatch(Decoder):
    """Up to `places` sequences of the trained context each."""

    def __init__(self, trained: TrainedModel, places: int) -> None:
        super().__init__(trained, places, trained.config.data.seq_length + _SLACK)
        self.places = places
        self._lengths: list[int] = []  # tokens of the sequence in each row in use

    def __len__(self) -> int:
        return len(self._lengths)

    def join(self, own: Decoder) -> None:
        """Add the one sequence that `own` was fed as the last row."""
        row, size = len(self._lengths), own.length
        assert row < self.places
        if size > self.length:
            self._move(size - self.length)
        begin = self.length - size
        for ours, theirs in zip(self._keys + self._values, own._keys + own._values, strict=True):
            ours[row, :, begin : self.length] = theirs[0, :, :size]
        self._tokens[row] = MISSING
        self._tokens[row, begin : self.length] = own._tokens[0, :size]
        if self._history is not None and own._history is not None:
            self._history[row] = own._history[0]
        self._lengths.append(size)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every sequence, in row order: logits [k, V] of what follows."""
        assert len(tokens) == len(self._lengths) > 0
        spare = self.length - max(self._lengths)
        if spare >= _SLACK:
            self._move(-spare)
        self._lengths = [length + 1 for length in self._lengths]
        column = torch.tensor(tokens, device=self._tokens.device).unsqueeze(1)
        return self.feed(column)[:, 0]

    def leave(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        last = len(self._lengths) - 1
        if row != last:
            for cache in self._keys + self._values:
                cache[row, :, : self.length] = cache[last, :, : self.length]
            self._tokens[row] = self._tokens[last]
            if self._history is not None:
                self._history[row] = self._history[last]
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()
        if not self._lengths:
            self.length = 0

    def _move(self, columns: int) -> None:
        """Move everything to the right (columns > 0) or the left, over what no sequence uses."""
        used, end = len(self._lengths), self.length
        begin = end - max(self._lengths, default=0)
        for cache in self._keys + self._values:
            moved = cache[:used, :, begin:end].clone()
            cache[:used, :, begin + columns : end + columns] = moved
        tokens = self._tokens[:used, begin:end].clone()
        self._tokens[:used] = MISSING
        self._tokens[:used, begin + columns : end + columns] = tokens
        self.length += columns
