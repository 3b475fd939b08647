"""Decoding with a key/value cache, from tokens to logits, and from prompts to texts.

Shapes: b batch, s new tokens of a call, c columns of the cache in use, d hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overtok_megatron.config.derived import head_size, key_value_heads
from overtok_megatron.errors import InputError
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.stream import TextStream, continuation
from overtok_megatron.model.attention import DecodeStep
from overtok_megatron.model.cache import KVCache
from overtok_megatron.model.documents import document_ids
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.ngram.ids import MISSING


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a text is drawn. temperature 0 = greedy; top_k 0 and top_p 1.0 = off; seed: the same one gives the same text."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0.0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("seed", -(2**63) <= self.seed < 2**64, "a number of 64 bits"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise InputError(f"{name}: {getattr(self, name)}; must be {rule}")


class IncrementalDecoder:
    """Feeds tokens to a model in pieces of any size; the logits are those of one full forward pass.

    A batch of prompts of different lengths is padded on the left: MISSING stands before the shorter ones. Where a call brings
    fewer rows than the cache has, the first rows are meant.
    """

    def __init__(self, trained: TrainedModel, batch: int, columns: int) -> None:
        """columns: tokens that a sequence can have, its padding included."""
        config = trained.config.model
        self.trained = trained
        self.cache = KVCache(
            batch=batch,
            columns=columns,
            num_layers=config.num_layers,
            num_key_value_heads=key_value_heads(config),
            head_size=head_size(config),
            dtype=trained.dtype,
            device=trained.device,
        )
        self._window = config.sliding_window

    @torch.no_grad()
    def feed(self, tokens: Tensor, *, last: bool = False) -> Tensor:
        """Append tokens [b, s] int64 (MISSING = padding, only before a sequence's first token) -> logits [b, s, V].

        last: only those of the last position, [b, 1, V].
        """
        fetched = self._fetch_rows(tokens)
        step = self._decode_step(tokens)
        hidden = self.trained.model.hidden(tokens.clamp(min=0), fetched, step)[0]  # [b, s, d]
        return self.trained.model.head.logits(hidden[:, -1:] if last else hidden)

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep only the first `lengths[row]` tokens of each of the first rows: the next `feed` goes on after them.

        The result is as if the other tokens had never been fed. The rows may then end at different columns.
        """
        self.cache.crop(lengths)

    def _decode_step(self, tokens: Tensor) -> DecodeStep:
        """Append the tokens to the cache, and say what each of them sees there: c columns are in use."""
        columns = self.cache.append(tokens).unsqueeze(2)  # [1 or b, s, 1]
        fed = self.cache.fed(len(tokens))  # [b, c]
        present = fed >= 0
        count = present.cumsum(dim=1)
        positions = (_at(count, columns) - 1).clamp(min=0)  # [b, s]: padding takes no position
        keys = torch.arange(fed.shape[1], device=tokens.device)  # [c]
        mask = (keys <= columns) & present[:, None, :]  # [b, s, c]
        if self.trained.model.eod_id is not None:
            documents = document_ids(fed, self.trained.model.eod_id)
            mask = mask & (_at(documents, columns)[:, :, None] == documents[:, None, :])
        mask = mask | (keys == columns)  # padding sees itself, so that no softmax row is empty
        near = mask if self._window is None else mask & (keys > columns - self._window)
        return DecodeStep(positions=positions, mask=mask.unsqueeze(1), sliding_mask=near.unsqueeze(1), cache=self.cache)

    def _fetch_rows(self, tokens: Tensor) -> FetchedRows | None:
        """The rows of the new tokens' n-grams, which reach back to tokens fed before."""
        if self.trained.tables is None:
            return None
        reach = self.trained.tables.family.history_length
        return self.trained.fetch_rows(tokens, self.cache.history(len(tokens), reach))


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


def generate_tokens(trained: TrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continuations of tokenized prompts, each up to its end-of-document token (left out) or max_new_tokens.

    Raises InputError for an empty prompt, or one that with max_new_tokens does not fit the context that was trained.
    """
    if not prompts:
        return []
    results: list[list[int]] = [[] for _ in prompts]
    for chosen in stream_tokens(trained, prompts, sampling):
        for result, token in zip(results, chosen, strict=True):
            if token is not None:
                result.append(token)
    return results


def _check_room(trained: TrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    context = trained.config.data.seq_length
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {index + 1}: empty; give at least one character")
        if len(prompt) + sampling.max_new_tokens > context:
            raise InputError(
                f"prompt {index + 1}: {len(prompt)} tokens and max_new_tokens {sampling.max_new_tokens} pass the "
                f"context of {context} tokens; shorten it, or ask for at most {max(0, context - len(prompt))}"
            )


def stream_tokens(
    trained: TrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Iterator[list[int | None]]:
    """The next token of every prompt, step by step; None from its end-of-document token on.

    Every prompt has a random stream of its own, made from the seed: its text does not depend on the other prompts.
    Raises as `generate_tokens`, at the first step.
    """
    _check_room(trained, prompts, sampling)
    device = trained.device
    tokens = pad_left(prompts, device)
    decoder = IncrementalDecoder(trained, len(prompts), tokens.shape[1] + sampling.max_new_tokens)
    generators = [torch.Generator(device=device).manual_seed(sampling.seed) for _ in prompts]
    eod = trained.tokenizer.eod_id
    running = [True] * len(prompts)
    for _ in range(sampling.max_new_tokens):
        logits = decoder.feed(tokens, last=True)[:, -1].float()  # [b, V]
        chosen = torch.cat(
            [choose(row[None], sampling, generator) for row, generator in zip(logits, generators, strict=True)]
        )
        values = chosen.tolist()
        running = [runs and token != eod for runs, token in zip(running, values, strict=True)]
        if not any(running):
            return
        yield [token if runs else None for token, runs in zip(values, running, strict=True)]
        tokens = chosen.unsqueeze(1)


def generate_texts(
    trained: TrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: Sequence[str] = (),
    *,
    alone: bool = False,
) -> list[str]:
    """Continuations of tokenized prompts as text, up to the first stop string (left out); else as `generate_tokens`.

    The text is what the tokens spell after their prompt; alone: what they spell without it.
    """
    tokenizer = trained.tokenizer
    contexts: list[Sequence[int]] = [() if alone else prompt for prompt in prompts]
    if not stops:  # then it is enough to decode all tokens at once
        generated = generate_tokens(trained, prompts, sampling)
        return [continuation(tokenizer, before, tokens) for before, tokens in zip(contexts, generated, strict=True)]
    if not prompts:
        return []
    streams = [TextStream(tokenizer, stops, before) for before in contexts]
    for chosen in stream_tokens(trained, prompts, sampling):
        for stream, token in zip(streams, chosen, strict=True):
            if token is not None and not stream.stopped:
                stream.add(token)
        if all(stream.stopped or token is None for stream, token in zip(streams, chosen, strict=True)):
            break
    for stream in streams:
        stream.finish()
    return [stream.text for stream in streams]


def stream_texts(trained: TrainedModel, prompt: str, sampling: Sampling) -> Iterator[str]:
    """The continuation of one text, in pieces as they become certain; joined they are what `generate` gives."""
    tokens = trained.tokenizer.encode(prompt)
    stream = TextStream(trained.tokenizer, prompt=tokens)
    for (token,) in stream_tokens(trained, [tokens], sampling):
        if token is not None:
            yield stream.add(token)
    yield stream.finish()


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each row of logits [b, V] float32, [b] int64."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    best = logits.amax(dim=-1, keepdim=True)
    logits = (logits - best).double() / sampling.temperature  # double, so that a tiny temperature does not overflow
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, tokens = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = (
            probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
        )  # the first token that reaches top_p stays
        logits = logits.masked_fill(beyond.scatter(-1, tokens, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def generate(trained: TrainedModel, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """Continuations of texts; see `generate_tokens`."""
    return generate_texts(trained, trained.tokenizer.encode_batch(list(prompts)), sampling)
