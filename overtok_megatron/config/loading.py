"""YAML and command line to a checked RunConfig, with where every value came from. Rules across keys: validation.py."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from overtok_megatron.config import dialect
from overtok_megatron.config.explanations import explain, known_keys
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import ConfigError

BASE = "base"  # the key that names the file from which a configuration inherits
COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where each dotted key got its value: "file:line", "command line" or "default"."""

    config: RunConfig
    provenance: dict[str, str]

    def locate(self, key: str) -> str:
        """Where a dotted key's value came from; "default" if nobody gave it."""
        return self.provenance.get(key, DEFAULT)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a file with the files that it inherits from, apply `section.key=value` overrides, check every key and type.

    Raises ConfigError, one line: place, key, value, and what is allowed.
    """
    values, places = _read_with_bases(Path(path), ())
    return _resolve(values, places, overrides, str(path))


def change_config(config: RunConfig, overrides: Sequence[str], source: str) -> LoadedConfig:
    """A configuration that is there already, under `section.key=value` overrides; source: what messages call it.

    Raises ConfigError as load_config does.
    """
    return _resolve(config.model_dump(mode="json"), dict.fromkeys(known_keys(), source), overrides, source)


def _resolve(values: dict[str, Any], places: dict[str, str], overrides: Sequence[str], source: str) -> LoadedConfig:
    """Apply overrides to `values` and check every key and type; source: what stands for the place of a missing key."""
    for override in overrides:
        key, value = _parse_override(override)
        _assign(values, key, value)
        _forget(places, key)
        places |= dict.fromkeys([key, *_leaves(value, f"{key}.")], COMMAND_LINE)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error.errors(), places, source)) from None
    raw = dialect.unwritable(config.deepspeed)
    if raw is not None:
        place = places.get("deepspeed", source)
        raise ConfigError(
            f"{place}: deepspeed: {raw!r} cannot be written as JSON; use numbers, strings, lists and mappings"
        )
    return LoadedConfig(config, dict.fromkeys(known_keys(), DEFAULT) | places)


def parse_resolved(path: str | Path) -> RunConfig:
    """A configuration that `save_resolved` wrote."""
    return load_config(path).config


def save_resolved(config: RunConfig, path: str | Path) -> None:
    """Write every value, defaults included; the old file or the new one is there, never a part. Raises OSError."""
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    try:
        with aside.open("w", encoding="utf-8") as file:
            yaml.dump(config.model_dump(mode="json"), file, Dumper=dialect.Dumper, sort_keys=False, allow_unicode=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(step.name for step in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: inherits from itself through `{BASE}`: {circle}; remove one `{BASE}`")
    own, places = _read(path)
    if BASE not in own:
        return own, places
    base, place = own.pop(BASE), places.pop(BASE)
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{place}: {BASE}: {base!r}; must be the path of another configuration, relative to this file"
        )
    parent = path.parent / base
    if not parent.exists():
        raise ConfigError(
            f"{place}: {BASE}: {parent}: no such configuration file; write a path relative to {path.name}"
        )
    values, base_places = _read_with_bases(parent, (*chain, resolved))
    _merge(values, own, "", base_places)
    return values, base_places | places


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    values, places = dialect.parse(text, str(path))
    if values is None:
        raise ConfigError(f"{path}: is empty; must hold sections (model:, data:, ...)")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold sections (model:, data:, ...), found {type(values).__name__}")
    return values, places


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"{COMMAND_LINE}: {text!r}; overrides are written section.key=value")
    if key == BASE:
        raise ConfigError(f"{COMMAND_LINE}: {BASE}: {raw!r}; a base is named in a file, not in an override")
    return key, dialect.parse(raw, f"{COMMAND_LINE}: {key}", lines=False)[0]


def _leaves(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from _leaves(inner, f"{prefix}{key}.")


def _merge(values: dict[str, Any], own: dict[str, Any], prefix: str, places: dict[str, str]) -> None:
    """Deep merge of `own` into `values`; the places of what it replaces are forgotten."""
    for key, value in own.items():
        inner = values.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            _merge(inner, value, f"{prefix}{key}.", places)
        else:
            values[key] = value
            _forget(places, f"{prefix}{key}")


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[last] = value


def _forget(places: dict[str, str], key: str) -> None:
    for known in [known for known in places if known == key or known.startswith(f"{key}.")]:
        del places[known]
