"""Decoding: a key/value cache, and the last n - 1 tokens as the n-gram history, both per sequence of a left-padded batch.

Shapes: b batch, s new tokens of a call, n longest n-gram, T tables, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overtok_megatron.errors import InputError
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.model.attention import DecodeStep, empty_cache
from overtok_megatron.ngram.ids import MISSING


@dataclass(frozen=True)
class Sampling:
    """temperature 0 = greedy. top_k 0 and top_p 1.0 = off. seed makes a sampled text repeatable."""

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


class Decoder:
    """Feeds tokens to a model in pieces of any size; the logits are those of one full forward pass.

    A left-padded batch: sequences end together, and MISSING stands before the shorter ones.
    """

    def __init__(self, trained: TrainedModel, batch: int, room: int) -> None:
        config = trained.config.model
        self.trained = trained
        self.length = 0
        device = next(trained.model.parameters()).device
        self._keys, self._values = empty_cache(
            batch=batch,
            room=room,
            num_layers=config.num_layers,
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            head_size=config.hidden_size // config.num_attention_heads,
            like=next(trained.model.parameters()),
        )
        self._present = torch.zeros(batch, room, dtype=torch.bool, device=device)
        self._history: Tensor | None = None
        if trained.tables is not None:
            reach = trained.tables.ngram_hash.space.longest - 1
            self._history = torch.full((batch, reach), MISSING, dtype=torch.int64, device=device)

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Append tokens [b, s] int64 (MISSING = padding, only before a sequence's first token) -> logits [b, s, V]."""
        length = tokens.shape[1]
        begin, end = self.length, self.length + length
        self._present[:, begin:end] = tokens >= 0
        counted = self._present[:, :end].cumsum(dim=1)
        positions = (counted[:, begin:] - 1).clamp(min=0)  # [b, s]: padding takes no position
        places = torch.arange(end, device=tokens.device)
        causal = places <= places[begin:, None]  # [s, end]
        mask = causal & self._present[:, None, :end]
        mask = mask | (places == places[begin:, None])  # padding sees itself, so that no softmax row is empty
        decode = DecodeStep(positions, begin, mask.unsqueeze(1), self._keys, self._values)
        slots = self._slots(tokens)
        self.length = end
        return self.trained.model.logits(tokens.clamp(min=0), slots, decode)

    def _slots(self, tokens: Tensor) -> Tensor | None:
        tables = self.trained.tables
        if tables is None:
            return None
        assert self._history is not None
        slots = tables.begin(tokens, training=False, history=self._history)
        self._history = torch.cat([self._history, tokens], dim=1)[:, -self._history.shape[1] :]
        return slots


def pad_left(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[b, longest] int64, MISSING before the shorter sequences."""
    longest = max(len(sequence) for sequence in sequences)
    rows = [[MISSING] * (longest - len(sequence)) + list(sequence) for sequence in sequences]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def generate_tokens(trained: TrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Continuations of tokenised prompts, each up to its end-of-document token (left out) or max_new_tokens.

    Raises InputError for an empty prompt, or one that with max_new_tokens does not fit the context that was trained.
    """
    if not prompts:
        return []
    context = trained.config.data.seq_length
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {index + 1}: empty; give at least one character")
        if len(prompt) + sampling.max_new_tokens > context:
            raise InputError(
                f"prompt {index + 1}: {len(prompt)} tokens and max_new_tokens {sampling.max_new_tokens} pass the "
                f"context of {context} tokens; shorten it, or ask for at most {max(0, context - len(prompt))}"
            )
    device = next(trained.model.parameters()).device
    tokens = pad_left(prompts, device)
    decoder = Decoder(trained, len(prompts), tokens.shape[1] + sampling.max_new_tokens)
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    eod = trained.tokenizer.eod_id
    results: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for _ in range(sampling.max_new_tokens):
        chosen = choose(decoder.feed(tokens)[:, -1].float(), sampling, generator)  # [b]
        for index, token in enumerate(chosen.tolist()):
            running[index] = running[index] and token != eod
            if running[index]:
                results[index].append(token)
        if not any(running):
            break
        tokens = chosen.unsqueeze(1)
    return results


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next token of each row of logits [b, V] float32 -> [b] int64."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    best = logits.amax(dim=-1, keepdim=True)
    logits = (logits - best).double() / sampling.temperature  # so that no small temperature overflows
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        shares = ordered.softmax(dim=-1)
        beyond = shares.cumsum(dim=-1) - shares >= sampling.top_p  # the first token that reaches top_p stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def generate(trained: TrainedModel, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """Continuations of texts; see `generate_tokens`."""
    encoded = trained.tokenizer.encode_batch(list(prompts))
    return [trained.tokenizer.decode(tokens) for tokens in generate_tokens(trained, encoded, sampling)]
