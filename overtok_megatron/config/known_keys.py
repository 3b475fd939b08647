"""The keys of the schema by their dotted names, and which of them the writer of an unknown key probably meant."""

import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeGuard, get_args

from pydantic import BaseModel

from overtok_megatron.config.schema import RunConfig

_MOST_KEYS = 8  # that a message lists
_ALIKE = 0.65  # of names of keys, by difflib's ratio


@cache
def known_keys() -> dict[str, str]:
    """Every dotted key of the schema and its description; of a section within a section the key as well as those in it."""
    keys: dict[str, str] = {}
    for section, field in RunConfig.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            keys[section] = field.description or ""
            continue
        for name, own in inner.model_fields.items():
            keys[f"{section}.{name}"] = own.description or ""
            innermost = _section_of(own.annotation)
            for last, deep in (innermost.model_fields if innermost else {}).items():
                keys[f"{section}.{name}.{last}"] = deep.description or ""
    return keys


def keys_of(section: str) -> list[str]:
    """Names of the keys of a section, without those of the sections within it."""
    return [_name(known) for known in _inside(section)]


def keys_of_entry(section: str, name: str) -> list[str]:
    """Keys of the entries of a list of sections, where `name` is one of an entry (`added.0.rows`); else none."""
    field, number, *_ = [*name.split("."), ""]
    kind = getattr(RunConfig.model_fields.get(section), "annotation", None)
    fields = kind.model_fields if number.isdigit() and _is_section(kind) else {}
    entry = next(filter(_is_section, get_args(fields[field].annotation)), None) if field in fields else None
    return list(entry.model_fields) if entry else []


def required_keys(section: str) -> list[str]:
    """The keys of a section that have no default; where all have one, all of them."""
    kind = _section_of(RunConfig.model_fields[section].annotation)
    needed = [name for name, field in kind.model_fields.items() if field.is_required()] if kind else []
    return needed or keys_of(section)


def listed(keys: Sequence[str]) -> str:
    """The first keys, and how many more there are."""
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    return ", ".join(keys[:_MOST_KEYS]) + more


def similar_keys(key: str) -> list[str]:
    """What the writer of an unknown key, which may be one of an entry, probably meant: keys or a section; perhaps nothing."""
    keys = known_keys()
    if "." not in key:
        return (
            [known for known in keys if known.endswith(f".{key}")]
            or difflib.get_close_matches(key, list(RunConfig.model_fields), n=1, cutoff=0.5)
            or [known for known in keys if difflib.SequenceMatcher(None, key, _name(known)).ratio() >= 0.75][:1]
        )
    section, name = key.split(".", 1)
    entry = keys_of_entry(section, name)
    if entry:
        return difflib.get_close_matches(_name(name), entry, n=1, cutoff=_ALIKE)
    section, name = _split(key)
    return (
        _closest(name, _inside(section))
        or [known for known in keys if _name(known) == name]
        or _closest(name, list(keys))
    )


def suggestion(key: str) -> str:
    """What to write instead of an unknown dotted key, as the end of a sentence."""
    section, dot, name = key.partition(".")
    if dot and key in known_keys():
        return f"write it as {name} below {section}:"
    if dot and section == "base":
        return "base is the path of another file"
    entry = keys_of_entry(section, name)
    similar = similar_keys(key)
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    if entry:
        return f"keys of an entry: {listed(entry)}"
    inside = keys_of(_split(key)[0]) if dot else []
    return (
        f"keys of {_split(key)[0]}: {listed(inside)}"
        if inside
        else f"the sections are {', '.join(RunConfig.model_fields)}"
    )


def _split(key: str) -> tuple[str, str]:
    """(section, the rest) of a dotted key; a section within a section is one where the schema has it."""
    inner, _, last = key.rpartition(".")
    if inner in known_keys():
        return inner, last
    section, _, name = key.partition(".")
    return section, name


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation allows, alone or beside None."""
    return next((kind for kind in (annotation, *get_args(annotation)) if _is_section(kind)), None)


def _inside(section: str) -> list[str]:
    """Dotted keys of a section, without those of the sections within it."""
    return [known for known in known_keys() if known.rpartition(".")[0] == section]


def _name(key: str) -> str:
    return key.split(".")[-1]


def _closest(name: str, keys: Sequence[str]) -> list[str]:
    by_name = {_name(known): known for known in reversed(keys)}
    return [by_name[match] for match in difflib.get_close_matches(name, by_name, n=1, cutoff=_ALIKE)]
