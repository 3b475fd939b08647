"""Values of a study that follow from others: sizes in units of the vocabulary, rates in units of the base's, lengths in epochs.

| written | means |
| --- | --- |
| `over_encoding.table_rows: 16 x V` | 16 times the base of the hash; where that collides, the nearest good size |
| `KEY: 16 x V` | 16 times `model.vocab_size`, rounded |
| `KEY: 0.5 x base` | half the value that the key has without this override |
| `epochs: 2` | as many steps as come nearest to two readings of the training set |

The rules refuse a table whose size is close to a multiple of the hash base (config/collisions.py). `16 x V` is exactly such a
size, so it becomes the size whose ratio lies at the golden fraction between two integers and is nearest to 16 V: 15.618 V. With
`over_encoding.collision_check: warn` the size is taken as written.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from overtok_megatron.config import dialect
from overtok_megatron.config.alternatives import superseded
from overtok_megatron.config.collisions import collision_problem
from overtok_megatron.config.derived import hash_base
from overtok_megatron.config.loading import COMMAND_LINE, LoadedConfig, load_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.wording import line, short
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.sampler import SampleOrder
from overtok_megatron.errors import ConfigError

EPOCHS = "epochs"
TABLE_ROWS = "over_encoding.table_rows"
_TIMES = re.compile(r"^([0-9_]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*x\s*(V|base)$")


def override(key: str, value: Any) -> str:
    """The override that gives a key a value of YAML."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def resolve(base: str, overrides: Sequence[str]) -> tuple[LoadedConfig, list[str]]:
    """The configuration of `base` with the overrides of a study, and the plain overrides that give it.

    A later override of a key replaces an earlier one. Raises ConfigError as load_config does, and for what cannot be derived.
    """
    last: dict[str, str] = {}
    for one in overrides:
        key, _, value = one.partition("=")
        for other in (key, *_cancelled(key, value)):
            last.pop(other, None)
        last[key] = one
    plain = [one for one in last.values() if not _is_derived(one)]
    loaded = load_config(base, plain)
    for one in last.values():
        if _is_derived(one):
            plain += _derive(one, loaded.config)
            loaded = load_config(base, plain)
    return loaded, plain


def _cancelled(key: str, value: str) -> list[str]:
    """Earlier keys that a later one excludes, as a file's keys exclude those of its base."""
    length = ["training.train_iters", "training.train_tokens", EPOCHS]
    given = dialect.parse(value, key, lines=False)[0] if key != EPOCHS else None
    return length if key in length else [other for other, _ in superseded({key: given})]


def _is_derived(one: str) -> bool:
    key, _, value = one.partition("=")
    return key == EPOCHS or _TIMES.match(value.strip()) is not None


def _derive(one: str, config: RunConfig) -> list[str]:
    """The plain overrides that a derived one stands for."""
    key, _, value = one.partition("=")
    if key == EPOCHS:
        return [f"training.train_iters={iters_of_epochs(config, value)}"]
    found = _TIMES.match(value.strip())
    assert found is not None
    factor, unit = float(found[1].replace("_", "")), found[2]
    if unit == "base":
        return [override(key, _times_own(key, factor, config))]
    if key == TABLE_ROWS:
        return [override(key, table_rows(config, factor))]
    return [override(key, max(1, round(factor * config.model.vocab_size)))]


def _times_own(key: str, factor: float, config: RunConfig) -> float | int:
    """`factor` times the value of a key; a whole number where the value is one."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            line(
                COMMAND_LINE,
                f"{short(key)}: {factor:g} x base; its value in the base is not a number ({value}); write the value itself",
            )
        )
    return max(1, round(factor * value)) if isinstance(value, int) else factor * value


def table_rows(config: RunConfig, factor: float) -> int:
    """m for `factor` times the hash base: that number, or the nearest good size where it collides and may not.

    Raises ConfigError if no good size exists.
    """
    base, over = hash_base(config), config.over_encoding
    rows = max(1, round(factor * base))
    if over.collision_check == "warn":
        return rows
    problem = collision_problem(rows, base, (over.ngram_order - 1) * over.num_slices)
    if problem is None:
        return rows
    if problem.proposed_rows is None:
        raise ConfigError(
            line(
                COMMAND_LINE,
                f"{TABLE_ROWS}: {factor:g} x V; no size nearby keeps all tables away from multiples of {base}",
            )
        )
    return problem.proposed_rows


def iters_of_epochs(config: RunConfig, epochs: str) -> int:
    """The number of steps nearest to so many readings of the training set, at least one. Raises ConfigError or DataError."""
    try:
        times = float(epochs)
    except ValueError:
        times = 0.0
    if not 0.0 < times < 1e6:
        raise ConfigError(line(COMMAND_LINE, f"{EPOCHS}: {short(epochs)}; write a number above 0"))
    given = config.data.train
    if not isinstance(given, str):
        raise ConfigError(
            line(
                COMMAND_LINE,
                f"{EPOCHS}: {short(epochs)}; data.train names several sets, which end at different steps; give train_iters",
            )
        )
    order = SampleOrder(IndexedDataset(given).num_tokens, config.data.seq_length, config.data.shuffle_seed, given)
    return max(1, round(times * order.samples_per_epoch / config.training.global_batch_size))
