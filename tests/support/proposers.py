"""Proposers for tests: wrong, right or in between, without state and with caches of their own."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from overtok_megatron.inference.decoder import IncrementalDecoder
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.speculation import Proposer, Speculation

Draft = Callable[[Tensor], Tensor]


class BigramProposer:
    """The logits of a draft are the row of a table [V, V] that the token before it names. It has no state."""

    def __init__(self, table: Tensor, num_drafts: int) -> None:
        self.table, self.num_drafts = table, num_drafts

    def observe(self, tokens: Tensor, hidden: Tensor) -> None:
        assert len(tokens) == len(hidden)

    def propose(self, pending: Tensor, draft: Draft) -> Tensor:
        drafts = []
        for _ in range(self.num_drafts):
            pending = draft(self.table[pending])
            drafts.append(pending)
        return torch.stack(drafts, dim=1)

    def keep(self, tokens: Tensor, hidden: Tensor, counts: Sequence[int]) -> None:
        assert tokens.shape == hidden.shape[:2] == (len(counts), self.num_drafts + 1)
        assert all(1 <= count <= self.num_drafts + 1 for count in counts)

    def copy_row(self, source_row: int, target_row: int, source: Self | None = None) -> None:
        assert source is not None or source_row != target_row

    def clear_row(self, row: int) -> None:
        pass


class ModelProposer:
    """A model of its own drafts, with its own cache and n-gram history: what a head with state has to keep right.

    error: the logits of a draft get noise of this size, relative to their own, which depends on the token before it only.
    """

    def __init__(self, trained: TrainedModel, num_drafts: int, batch: int, columns: int, error: float = 0.0) -> None:
        self.num_drafts, self.error = num_drafts, error
        self.decoder = IncrementalDecoder(trained, batch, columns + num_drafts)
        vocab = trained.config.model.vocab_size
        self.noise = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(5))

    def observe(self, tokens: Tensor, hidden: Tensor) -> None:
        self.decoder.feed(tokens)

    def propose(self, pending: Tensor, draft: Draft) -> Tensor:
        drafts = []
        for _ in range(self.num_drafts):
            logits = self.decoder.feed(pending.unsqueeze(1))[:, 0].float()
            pending = draft(logits + self.error * logits.std(dim=-1, keepdim=True) * self.noise[pending])
            drafts.append(pending)
        self.decoder.feed(pending.unsqueeze(1))  # so that it can be kept, where all are
        return torch.stack(drafts, dim=1)

    def keep(self, tokens: Tensor, hidden: Tensor, counts: Sequence[int]) -> None:
        lengths = self.decoder.cache.lengths
        self.decoder.crop([lengths[row] - (self.num_drafts + 1) + count for row, count in enumerate(counts)])
        for row, count in enumerate(counts):
            end = self.decoder.cache.ends[row]
            assert self.decoder.cache.tokens[row, end - count : end].tolist() == tokens[row, :count].tolist()

    def copy_row(self, source_row: int, target_row: int, source: Self | None = None) -> None:
        cache = None if source is None else source.decoder.cache
        length = (cache or self.decoder.cache).lengths[source_row]
        self.decoder.cache.copy_row(source_row, target_row, cache, end=length)

    def clear_row(self, row: int) -> None:
        self.decoder.cache.clear_row(row)


def bigrams(vocab: int, num_drafts: int, scale: float = 3.0) -> Speculation:
    """Drafts from a random table: nearly always wrong."""
    table = scale * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(3))
    return Speculation(lambda batch, columns: checked(BigramProposer(table, num_drafts)))


def by_model(trained: TrainedModel, num_drafts: int, error: float = 0.0) -> Speculation:
    """Drafts from a model: always right where it is the one that verifies, and error is 0."""
    return Speculation(lambda batch, columns: checked(ModelProposer(trained, num_drafts, batch, columns, error)))


def checked(proposer: Proposer) -> Proposer:
    """The proposer; mypy compares it with the protocol here."""
    return proposer
