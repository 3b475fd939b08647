"""YAML and command line to a checked RunConfig, with where every value came from. Rules across keys: validation.py."""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import ConfigError

BASE = "base"  # the key that names the file from which a configuration inherits
COMMAND_LINE = "command line"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: `1e-4` is a number, `on` and `no` are words. Keys may not repeat."""


_REPLACED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, expression) for tag, expression in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and, for every key given, its place ("file:line" or "command line")."""

    config: RunConfig
    provenance: dict[str, str]

    def locate(self, key: str) -> str:
        """Where a dotted key's value came from; "default" if nobody gave it."""
        return self.provenance.get(key, "default")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a file with the files that it inherits from, apply `section.key=value` overrides, check every key and type.

    Raises ConfigError, one line: place, key, value, and what is allowed.
    """
    values, places = _read_with_bases(Path(path), ())
    for override in overrides:
        key, value = _parse_override(override)
        _assign(values, key, value)
        _forget(places, key)
        places |= dict.fromkeys(_leaves(value, key), COMMAND_LINE)
    try:
        return LoadedConfig(RunConfig.model_validate(values), places)
    except ValidationError as error:
        # a key that is missing is often one that stands there misspelt: what is wrong goes before what is not there
        first = min(error.errors(), key=lambda e: (e["type"] == "missing", e["type"] != "extra_forbidden"))
        raise ConfigError(_explain(first, places, str(path))) from None


def parse_resolved(path: str | Path) -> RunConfig:
    """A configuration that `save_resolved` wrote."""
    return load_config(path).config


def save_resolved(config: RunConfig, path: Path) -> None:
    """Write every value, defaults included; the old file or the new one is there, never a part."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        yaml.safe_dump(config.model_dump(mode="json"), file, sort_keys=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    resolved = path.resolve()
    if resolved in chain:
        raise ConfigError(
            f"{path}: inherits from itself through `{BASE}`: {' -> '.join(str(p) for p in (*chain, resolved))}"
        )
    own, places = _read(path)
    if BASE not in own:
        return own, places
    base = own.pop(BASE)
    place = places.pop(BASE)
    if not isinstance(base, str):
        raise ConfigError(
            f"{place}: {BASE}: {base!r}; must be the path of another configuration, relative to this file"
        )
    values, base_places = _read_with_bases(path.parent / base, (*chain, resolved))
    for key, value in _flatten(own):
        _assign(values, key, value)
        _forget(base_places, key)
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
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: must hold sections (model:, data:, ...), found {type(values).__name__}")
    return values, dict(_places(node, str(path), ""))


def _places(node: yaml.MappingNode, file: str, prefix: str) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = f"{prefix}{key_node.value}"
        if key in seen:
            raise ConfigError(f"{file}:{line}: {key} is given twice; remove one")
        seen.add(key)
        yield key, f"{file}:{line}"
        if isinstance(value_node, yaml.MappingNode):
            yield from _places(value_node, file, f"{key}.")


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"{COMMAND_LINE}: {text!r}; overrides are written section.key=value")
    try:
        return key, yaml.load(raw, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{COMMAND_LINE}: {key}: {raw!r} is not valid YAML; quote it") from None


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def _leaves(value: Any, key: str) -> list[str]:
    return [key, *(name for name, _ in _flatten(value, f"{key}."))] if isinstance(value, dict) else [key]


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


def known_keys() -> dict[str, str]:
    """Every dotted key of the schema and its description."""
    keys: dict[str, str] = {}
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys |= {f"{section}.{name}": inner.description or "" for name, inner in kind.model_fields.items()}
        else:
            keys[section] = field.description or ""
    return keys


def _nearest(key: str) -> str:
    keys = known_keys()
    sections = list(RunConfig.model_fields)
    if "." not in key:
        inside = [known for known in keys if known.endswith(f".{key}")]
        close = inside or difflib.get_close_matches(key, sections, n=1, cutoff=0.5)
        return f"did you mean {close[0]}?" if close else f"the sections are {', '.join(sections)}"
    section, name = key.split(".", 1)
    exact = [known for known in keys if known.split(".")[-1] == name]
    close = exact or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        by_name = {known.split(".")[-1]: known for known in keys}
        close = [by_name[match] for match in difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)]
    if close:
        return f"did you mean {close[0]}?"
    return f"keys of {section}: {', '.join(known.split('.')[1] for known in keys if known.startswith(section + '.'))}"


def _explain(error: ErrorDetails, places: dict[str, str], path: str) -> str:
    parts = [str(part) for part in error["loc"]]
    key = ".".join(parts)
    place = next(
        (places[".".join(parts[:end])] for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in places), path
    )
    known = known_keys()
    meaning = known.get(".".join(parts[:2])) or known.get(parts[0], "")
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key {key}; {_nearest(key)}"
    if error["type"] == "missing":
        return f"{place}: {key} is missing{f' ({meaning})' if meaning else ''}; add it"
    rule = error["msg"].removeprefix("Input ").replace("\n", " ")
    text = f"{place}: {key}: {error['input']!r} {rule}"
    return f"{text} ({meaning})" if meaning else text
