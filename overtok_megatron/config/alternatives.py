"""Keys that exclude each other. Where two of them are given in different sources, the more specific source wins: the command
line over the file, the file over its base. Within one source they contradict each other, which the rules across keys refuse.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alternative:
    """A source that gives `key` a value that `chosen` accepts cancels the values of `others` from less specific sources."""

    key: str
    others: tuple[str, ...]
    chosen: Callable[[Any], bool]


def _given(value: Any) -> bool:
    return value is not None


def _is(*values: object) -> Callable[[Any], bool]:
    return lambda value: any(value is one or value == one for one in values)


def _is_not(value: str) -> Callable[[Any], bool]:
    return lambda given: isinstance(given, str) and given != value


_EXPERTS = ("num_experts_per_token", "normalize_expert_weights", "router_z_loss_weight")
_LLAMA3 = ("low_freq_factor", "high_freq_factor")
_YARN = ("beta_fast", "beta_slow", "attention_factor")
_LENGTH = ("original_max_position_embeddings",)


def _below(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


ALTERNATIVES = (
    Alternative("training.train_iters", ("training.train_tokens",), _given),
    Alternative("training.train_tokens", ("training.train_iters",), _given),
    Alternative("model.attention_pattern", ("model.full_attention_interval",), _given),
    Alternative("model.full_attention_interval", ("model.attention_pattern",), _given),
    Alternative("model.sliding_window", _below("model", "attention_pattern", "full_attention_interval"), _is(None)),
    Alternative("model.num_experts", _below("model", *_EXPERTS), _is(None)),
    Alternative("model.rope_scaling.type", _below("model.rope_scaling", *_LENGTH, *_LLAMA3, *_YARN), _is("linear")),
    Alternative("model.rope_scaling.type", _below("model.rope_scaling", *_YARN), _is("llama3")),
    Alternative("model.rope_scaling.type", _below("model.rope_scaling", *_LLAMA3), _is("yarn")),
    Alternative("optimizer.schedule", ("optimizer.decay_iters",), _is_not("wsd")),
    Alternative("tokenizer.type", _below("tokenizer", "path", "eod_token"), _is("bytes")),
)


def superseded(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, the key that replaces it): what `given`, the dotted keys of one source and their values, cancels from less
    specific sources. Never a key that it gives itself."""
    for alternative in ALTERNATIVES:
        if alternative.key in given and alternative.chosen(given[alternative.key]):
            for other in alternative.others:
                if other not in given:
                    yield other, alternative.key
