"""Decoding with a key/value cache, from tokens to hidden states and logits.

Shapes: b batch, s new tokens of a call, c columns of the cache in use, d hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from overtok_megatron.config.derived import head_size, key_value_heads
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.model.attention import DecodeStep
from overtok_megatron.model.cache import KVCache
from overtok_megatron.model.documents import document_ids
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.ngram.ids import MISSING


class Run(NamedTuple):
    """What a pass over a batch adds to one sequence: tokens, and logits [r, V] float32, the first of which chose them."""

    tokens: list[int]
    logits: Tensor


class IncrementalDecoder:
    """Feeds tokens to a model in pieces of any size; the logits are those of one full forward pass.

    A batch of prompts of different lengths is padded on the left: MISSING stands before the shorter ones. Where a call brings
    fewer rows than the cache has, the first rows are meant.
    """

    def __init__(self, trained: TrainedModel, batch: int, columns: int) -> None:
        """columns: tokens that a sequence can have, its padding included."""
        self.trained = trained
        self.cache = empty_cache(trained, batch, columns, trained.config.model.num_layers)
        self._window = trained.config.model.sliding_window

    @torch.no_grad()
    def feed(self, tokens: Tensor, *, last: bool = False) -> Tensor:
        """Append tokens [b, s] int64 (MISSING = padding, only before a sequence's first token) -> logits [b, s, V].

        last: only those of the last position, [b, 1, V].
        """
        hidden = self.hidden(tokens)
        return self.trained.model.head.logits(hidden[:, -1:] if last else hidden)

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """Append tokens as `feed` does: their last hidden states [b, s, d], before the final norm."""
        fetched = fetch_rows(self.trained, self.cache, tokens)
        step = append_tokens(self.cache, tokens, eod_id=self.trained.model.eod_id, window=self._window)
        return self.trained.model.hidden(tokens.clamp(min=0), fetched, step)[0]

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep only the first `lengths[row]` tokens of each of the first rows: the next `feed` goes on after them.

        The result is as if the other tokens had never been fed. The rows may then end at different columns.
        """
        self.cache.crop(lengths)


def empty_cache(trained: TrainedModel, batch: int, columns: int, num_layers: int) -> KVCache:
    """A cache for `num_layers` layers with the attention of the model's."""
    config = trained.config.model
    return KVCache(
        batch=batch,
        columns=columns,
        num_layers=num_layers,
        num_key_value_heads=key_value_heads(config),
        head_size=head_size(config),
        dtype=trained.dtype,
        device=trained.device,
    )


def append_tokens(cache: KVCache, tokens: Tensor, *, eod_id: int | None, window: int | None) -> DecodeStep:
    """Append tokens [b, s] to the cache, and say what each of them sees there: c columns are in use.

    eod_id: the token that ends a document, where positions attend within their document only. window: of the layers with a
    sliding window.
    """
    columns = cache.append(tokens).unsqueeze(2)  # [1 or b, s, 1]
    fed = cache.fed(len(tokens))  # [b, c]
    present = fed >= 0
    count = present.cumsum(dim=1)
    positions = (_at(count, columns) - 1).clamp(min=0)  # [b, s]: padding takes no position
    keys = torch.arange(fed.shape[1], device=tokens.device)  # [c]
    mask = (keys <= columns) & present[:, None, :]  # [b, s, c]
    if eod_id is not None:
        documents = document_ids(fed, eod_id)
        mask = mask & (_at(documents, columns)[:, :, None] == documents[:, None, :])
    mask = mask | (keys == columns)  # padding sees itself, so that no softmax row is empty
    near = mask if window is None else mask & (keys > columns - window)
    return DecodeStep(positions=positions, mask=mask.unsqueeze(1), sliding_mask=near.unsqueeze(1), cache=cache)


def fetch_rows(trained: TrainedModel, cache: KVCache, tokens: Tensor) -> FetchedRows | None:
    """The rows of the n-grams of tokens [b, s] that are about to be appended to the cache; they reach back to tokens in it."""
    if trained.tables is None:
        return None
    reach = trained.tables.family.history_length
    return trained.fetch_rows(tokens, cache.history(len(tokens), reach))


def _at(values: Tensor, columns: Tensor) -> Tensor:
    """The entries of values [b, c] in columns [1 or b, s, 1]: [b, s]."""
    if len(columns) == 1:  # the last columns, for all rows
        return values[:, -columns.shape[1] :]
    return values.gather(1, columns.squeeze(2))


def pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[b, longest] int64, MISSING before the shorter sequences."""
    longest = max(len(sequence) for sequence in sequences)
    rows = [[MISSING] * (longest - len(sequence)) + list(sequence) for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64, device=device)
