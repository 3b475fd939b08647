"""How the next token is drawn from logits: greedily, or from their distribution after temperature, top-k and top-p.

Shapes: b batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overtok_megatron.errors import InputError


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


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each row of logits [b, V] float32, [b] int64."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    return torch.multinomial(distribution(logits, sampling), 1, generator=generator).squeeze(-1)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """From which the next token is drawn at a temperature above 0: logits [.., V] float32 -> probabilities [.., V] float64."""
    best = logits.amax(dim=-1, keepdim=True)
    logits = (logits - best).double() / sampling.temperature  # double, so that a tiny temperature does not overflow
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, tokens = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # the first token that reaches top_p stays
        beyond = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(beyond.scatter(-1, tokens, beyond), float("-inf"))
    return logits.softmax(dim=-1)


@dataclass(frozen=True)
class Draw:
    """How the tokens of one sequence are drawn, and its random stream, which is on the model's device."""

    sampling: Sampling
    generator: torch.Generator

    @classmethod
    def begin(cls, sampling: Sampling, device: torch.device) -> "Draw":
        """With the random stream that the seed gives, from its begin."""
        return cls(sampling, torch.Generator(device=device).manual_seed(sampling.seed))


def choose_each(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The next token of every sequence, int64 [b], from its row of logits [b, V] float32."""
    chosen = [choose(row[None], draw.sampling, draw.generator) for row, draw in zip(logits, draws, strict=True)]
    return torch.cat(chosen)
