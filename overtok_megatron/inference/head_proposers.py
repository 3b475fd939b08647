"""Drafts from a model's own heads: from over-decoding tables all at once, or from multi-token layers one after the other.

Shapes: b sequences, s tokens of a call, k drafts, d hidden, V vocabulary, D depths of multi-token prediction, h tokens that
n-grams reach back to (0 for a plain model).
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from overtok_megatron.errors import InputError
from overtok_megatron.inference.decoder import append_tokens, empty_cache
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.speculation import Proposer, Speculation
from overtok_megatron.model.over_decoding import OverDecodingTable
from overtok_megatron.ngram.ids import MISSING
from overtok_megatron.parallel.uploading import moved


def head_speculation(trained: TrainedModel) -> Speculation:
    """Drafts from the model's heads: of multi-token layers where it has them, for they read the token before each draft; else
    of over-decoding tables.

    Raises InputError for a model without such heads.
    """
    model = trained.model
    if model.multi_token is None and model.over_decoding is None:
        raise InputError(
            "--speculative: this model has no heads that draft tokens (over_decoding.num_tokens: 1, "
            "multi_token_prediction.depth: 0); leave --speculative out, or name a model that was trained with one of them"
        )

    def make_proposer(batch: int, columns: int) -> Proposer:
        if model.multi_token is None:
            return OverDecodingProposer(trained, batch)
        return MultiTokenProposer(trained, batch, columns)

    return Speculation(make_proposer)


class OverDecodingProposer:
    """Table j drafts the token j ahead of the last hidden state; none of them sees the drafts before it."""

    def __init__(self, trained: TrainedModel, batch: int) -> None:
        assert trained.model.over_decoding is not None
        tables = trained.model.over_decoding.tables.values()
        self._tables = [table for table in tables if isinstance(table, OverDecodingTable)]
        self._last = torch.zeros(batch, trained.config.model.hidden_size, dtype=trained.dtype, device=trained.device)

    @property
    def num_drafts(self) -> int:
        return len(self._tables)

    def observe(self, tokens: Tensor, hidden: Tensor) -> None:
        self._last[: len(tokens)] = hidden[:, -1]

    def propose(self, pending: Tensor, draft: Callable[[Tensor], Tensor]) -> Tensor:
        last = self._last[: len(pending)].unsqueeze(1)  # [b, 1, d]
        logits = (table.logits(last, last)[:, 0] for table in self._tables)
        return torch.stack([draft(one.float()) for one in logits], dim=1)

    def keep(self, tokens: Tensor, hidden: Tensor, counts: Sequence[int]) -> None:
        ends = moved(torch.tensor(counts), hidden.device) - 1
        self._last[: len(counts)] = hidden[torch.arange(len(counts), device=hidden.device), ends]

    def copy_row(self, source_row: int, target_row: int, source: Self | None = None) -> None:
        self._last[target_row] = (self if source is None else source)._last[source_row]

    def clear_row(self, row: int) -> None:
        pass  # what `observe` or `copy_row` writes next takes its place


class MultiTokenProposer:
    """Depth j drafts the token j after the pending one, from the embedding of the token before it.

    Depth j reads, at a position, the tokens of the next j positions. At the last D positions some depth has therefore read
    drafts, which may be rejected. The proposer keeps the hidden states and tokens of the last D + 1 positions of each sequence,
    as many as a pass adds at most, and runs them again with each pass: the same number for every sequence, whatever it
    accepted. The positions before them are in a cache, one layer per depth. One read of rows per draft.
    """

    def __init__(self, trained: TrainedModel, batch: int, columns: int) -> None:
        layers = trained.model.multi_token
        assert layers is not None
        self._trained, self._layers = trained, layers
        self._window = layers.depth + 1
        self._reach = 0 if trained.tables is None else trained.tables.family.history_length
        device, size = trained.device, trained.config.model.hidden_size
        self._tokens = torch.full((batch, self._reach + self._window), MISSING, device=device)
        self._hidden = torch.zeros(batch, self._window, size, dtype=trained.dtype, device=device)
        # The further columns are of padding before a sequence, and of positions that run again.
        self._cache = empty_cache(trained, batch, columns + 2 * self._window, layers.depth)

    @property
    def num_drafts(self) -> int:
        return self._layers.depth

    def observe(self, tokens: Tensor, hidden: Tensor) -> None:
        rows, count = tokens.shape
        tokens = torch.cat([self._tokens[:rows], tokens], dim=1)  # [b, h + D + 1 + s]
        hidden = torch.cat([self._hidden[:rows], hidden], dim=1)  # [b, D + 1 + s, d]
        begin, depth = self._reach, self._layers.depth
        embedded = self._embed(tokens[:, 1 : begin + count + depth])  # [b, s + D - 1, d]: of the tokens after the first
        step = append_tokens(
            self._cache, tokens[:, begin : begin + count], eod_id=self._trained.model.eod_id, window=None
        )
        for _ in self._layers.states(hidden[:, :count], lambda j: embedded[:, j - 1 : j - 1 + count], step):
            pass  # keys and values of each depth are in the cache now
        self._tokens[:rows] = tokens[:, -self._tokens.shape[1] :]
        self._hidden[:rows] = hidden[:, -self._window :]

    def propose(self, pending: Tensor, draft: Callable[[Tensor], Tensor]) -> Tensor:
        rows = len(pending)
        tokens = torch.cat([self._tokens[:rows], pending.unsqueeze(1)], dim=1)  # [b, h + D + 2]
        step = append_tokens(self._cache, tokens[:, self._reach : -1], eod_id=self._trained.model.eod_id, window=None)
        embedded = self._embed(tokens[:, 1:])  # [b, D + 1, d]
        drafts: list[Tensor] = []

        def embed(depth: int) -> Tensor:
            nonlocal tokens, embedded
            if depth > 1:
                tokens = torch.cat([tokens, drafts[-1].unsqueeze(1)], dim=1)
                embedded = torch.cat([embedded[:, 1:], self._embed(tokens[:, -self._reach - 1 :])], dim=1)
            return embedded

        for state, _ in self._layers.states(self._hidden[:rows], embed, step):
            drafts.append(draft(self._trained.model.head.project(state[:, -1:])[:, 0].float()))
        return torch.stack(drafts, dim=1)

    def keep(self, tokens: Tensor, hidden: Tensor, counts: Sequence[int]) -> None:
        rows = len(counts)
        first = moved(torch.tensor(counts), hidden.device).unsqueeze(1)  # [b, 1]: so many leave the window
        index = first + torch.arange(self._tokens.shape[1], device=hidden.device)  # [b, h + D + 1]
        self._tokens[:rows] = torch.cat([self._tokens[:rows], tokens], dim=1).gather(1, index)
        index = index[:, : self._window, None].expand(-1, -1, hidden.shape[-1])
        self._hidden[:rows] = torch.cat([self._hidden[:rows], hidden], dim=1).gather(1, index)
        lengths = [
            max(0, length + count - self._window) for length, count in zip(self._cache.lengths, counts, strict=False)
        ]
        self._cache.crop(lengths)
        for row, length in enumerate(lengths):
            if not length:
                self._cache.clear_row(row)  # or the padding before a short sequence would take columns in each pass

    def copy_row(self, source_row: int, target_row: int, source: Self | None = None) -> None:
        other = self if source is None else source
        self._tokens[target_row] = other._tokens[source_row]
        self._hidden[target_row] = other._hidden[source_row]
        end = other._cache.lengths[source_row]
        self._cache.copy_row(source_row, target_row, None if other is self else other._cache, end=end)

    def clear_row(self, row: int) -> None:
        self._tokens[row] = MISSING
        self._hidden[row] = 0.0
        self._cache.clear_row(row)

    def _embed(self, tokens: Tensor) -> Tensor:
        """The embeddings [b, s, d] of the last s of tokens [b, h + s]; MISSING before a sequence is embedded as anything."""
        history, new = tokens[:, : self._reach], tokens[:, self._reach :]
        fetched = self._trained.fetch_rows(new, history)
        embedded: Tensor = self._trained.model.embedding(new.clamp(min=0), fetched)
        return embedded
