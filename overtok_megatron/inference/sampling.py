"""How the next token is drawn from logits: greedily, or from their distribution after temperature, top-k and top-p.

Shapes: b batch, V vocabulary.
"""

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
