"""YAML and command line to a checked RunConfig, with where every value came from. Rules across keys: validation.py."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from overtok_megatron.config import dialect
from overtok_megatron.config.alternatives import superseded
from overtok_megatron.config.explanations import explain
from overtok_megatron.config.known_keys import known_keys
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.wording import line, short
from overtok_megatron.errors import ConfigError
from overtok_megatron.files import refuse_foreign, write_atomically

BASE = "base"  # the key that names the file from which a configuration inherits
COMMAND_LINE = "command line"
DEFAULT = "default"
LONGEST_CHAIN = 32  # files that inherit from each other; nobody finds a value in more
_YOUNGER_SECTIONS = {"over_decoding", "multi_token_prediction"}  # which files of older versions lack


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where each dotted key got its value: "file:line", "command line" or "default".

    A key that another key of a more specific origin has cancelled: that origin and the other key, "command line, train_iters".
    """

    config: RunConfig
    provenance: dict[str, str]

    def locate(self, key: str) -> str:
        """Where a dotted key's value, or the first part of it, came from; "default" if nobody gave it."""
        if key in self.provenance:
            return self.provenance[key]
        return next((origin for name, origin in self.provenance.items() if name.startswith(f"{key}.")), DEFAULT)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a file with the files that it inherits from, apply `section.key=value` overrides, check every key and type.

    Raises ConfigError, a line for each wrong key: origin, key, value, and what is allowed.
    """
    values, origins = _read_with_bases(Path(path), ())
    return _resolve(values, origins, overrides, str(path))


def change_config(config: RunConfig, overrides: Sequence[str], source: str) -> LoadedConfig:
    """An existing configuration with `section.key=value` overrides applied; source: what messages call it.

    Raises ConfigError as load_config does.
    """
    return _resolve(config.model_dump(mode="json"), dict.fromkeys(known_keys(), source), overrides, source)


def _resolve(values: dict[str, Any], origins: dict[str, str], overrides: Sequence[str], source: str) -> LoadedConfig:
    """Apply overrides to `values` and check every key and type; source: what stands for the origin of a missing key."""
    given = _parse_overrides(overrides)
    own = {name: inner for key, value in given for name, inner in [(key, value), *_leaves(value, f"{key}.")]}
    _cancel(values, own, origins, dict.fromkeys(own, COMMAND_LINE))
    for key, value in given:
        _assign(values, key, value)
        _forget(origins, key)
        origins |= dict.fromkeys([key, *(name for name, _ in _leaves(value, f"{key}."))], COMMAND_LINE)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*explain(error.errors(), origins, source)) from None
    raw = dialect.unwritable(config.deepspeed)
    if raw is not None:
        origin = origins.get("deepspeed", source)
        raise ConfigError(
            line(
                origin,
                f"deepspeed: {raw} cannot be written as JSON; use numbers, strings, lists, and mappings with strings as keys",
            )
        )
    return LoadedConfig(config, dict.fromkeys(known_keys(), DEFAULT) | origins)


def save_resolved(config: RunConfig, path: str | Path, flag: str = "training.output_directory") -> None:
    """Write every value, defaults included; the old file or the new one is there, never a part.

    flag: what chose the path, for the message. Raises OutputError where a file that somebody wrote by hand would be replaced,
    and OSError.
    """
    path = Path(path)
    refuse_foreign(path, _is_resolved, "a resolved configuration", flag)
    text = yaml.dump(config.model_dump(mode="json"), Dumper=dialect.Dumper, sort_keys=False, allow_unicode=True)
    write_atomically(path, text)


def _is_resolved(path: Path) -> bool:
    """Whether a file looks like one of `save_resolved`, an older version's too: it has every section and inherits nothing."""
    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError):
        return False
    sections = RunConfig.model_fields.keys()
    return isinstance(found, dict) and sections - _YOUNGER_SECTIONS <= found.keys() <= sections


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    own, origins = _read(path)
    if BASE not in own:
        return own, origins
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(step.name for step in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(line(path, f"inherits from itself through `{BASE}`: {short(circle)}; remove one `{BASE}`"))
    if len(chain) == LONGEST_CHAIN:
        raise ConfigError(
            line(
                path,
                f"stands at the end of {LONGEST_CHAIN} files that name a `{BASE}`, and names one; merge some of them",
            )
        )
    base, origin = own.pop(BASE), origins.pop(BASE, str(path))
    if not isinstance(base, str) or not base:
        raise ConfigError(
            line(
                origin,
                f"{BASE}: {short(repr(base))}; must be the path of another configuration, relative to this file",
            )
        )
    parent = path.parent / base
    if not _is_there(parent):
        raise ConfigError(
            line(
                origin,
                f"{BASE}: {short(str(parent))}: no such configuration file; write a path relative to {short(path.name)}",
            )
        )
    values, base_origins = _read_with_bases(parent, (*chain, resolved))
    _cancel(values, dict(_leaves(own, "")), base_origins, origins)
    _merge(values, own, "", base_origins)
    return values, base_origins | origins


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or with a NUL
        return False


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    values, origins = dialect.read(path)
    if values is None:
        raise ConfigError(line(path, "is empty; must hold sections (model:, data:, ...)"))
    if not isinstance(values, dict):
        raise ConfigError(line(path, f"must hold sections (model:, data:, ...), found {type(values).__name__}"))
    return values, origins


def _parse_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Key and value of each; raises ConfigError, a line for each of those that cannot be read."""
    given, wrong = [], []
    for override in overrides:
        try:
            given.append(_parse_override(override))
        except ConfigError as error:
            wrong += error.lines
    if wrong:
        raise ConfigError(*wrong)
    return given


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        example = f", as {key}=value" if not equals and re.fullmatch(r"\w+(\.\w+)+", key) else ""
        raise ConfigError(line(COMMAND_LINE, f"{short(repr(text))}; overrides are written section.key=value{example}"))
    if key == BASE:
        raise ConfigError(
            line(COMMAND_LINE, f"{BASE}: {short(repr(raw))}; a base is named in a file, not in an override")
        )
    return key, dialect.parse(raw, f"{COMMAND_LINE}: {short(key)}", lines=False)[0]


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every dotted key in a mapping with its value, mappings within it included."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}", inner
            yield from _leaves(inner, f"{prefix}{key}.")


def _cancel(values: dict[str, Any], own: dict[str, Any], origins: dict[str, str], own_origins: dict[str, str]) -> None:
    """Remove from `values` the keys that the more specific keys `own` (dotted) exclude; the origins then name those."""
    for key, winner in superseded(own):
        *parents, last = key.split(".")
        section: Any = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and section.pop(last, None) is not None:
            _forget(origins, key)
            origins[key] = f"{own_origins.get(winner, DEFAULT)}, {winner.rpartition('.')[2]}"


def _merge(values: dict[str, Any], own: dict[str, Any], prefix: str, origins: dict[str, str]) -> None:
    """Deep merge of `own` into `values`; the origins of what it replaces are forgotten."""
    for key, value in own.items():
        inner = values.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            _merge(inner, value, f"{prefix}{key}.", origins)
        else:
            values[key] = value
            _forget(origins, f"{prefix}{key}")


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[last] = value


def _forget(origins: dict[str, str], key: str) -> None:
    for known in [known for known in origins if known == key or known.startswith(f"{key}.")]:
        del origins[known]
