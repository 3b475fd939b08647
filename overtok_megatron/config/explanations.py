"""One line for what does not fit the schema: place, key, value, what is allowed, the nearest known key."""

import difflib
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.wording import line, short

_MOST_KEYS = 8  # that a message lists


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


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation allows, alone or beside None."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def nearest(key: str) -> str:
    """What the writer of an unknown dotted key probably meant, as the end of a sentence."""
    keys = known_keys()
    sections = list(RunConfig.model_fields)
    if "." not in key:
        inside = [known for known in keys if known.endswith(f".{key}")]
        close = inside or difflib.get_close_matches(key, sections, n=1, cutoff=0.5)
        close = (
            close or [known for known in keys if difflib.SequenceMatcher(None, key, _name(known)).ratio() >= 0.75][:1]
        )
        return f"did you mean {' or '.join(close)}?" if close else f"the sections are {', '.join(sections)}"
    if key in keys:
        section, name = key.split(".", 1)
        return f"write it as {name} below {section}:"
    section, name = key.split(".", 1)
    entry = _keys_of_entry(section, name)
    if entry:
        close = difflib.get_close_matches(_name(name), entry, n=1, cutoff=0.65)
        return f"did you mean {close[0]}?" if close else f"keys of an entry: {_listed(entry)}"
    if key.rsplit(".", 1)[0] in keys:
        section, name = key.rsplit(".", 1)
    if section == "base":
        return "base is the path of another file"
    same = _inside(section)
    close = _closest(name, same) or [known for known in keys if _name(known) == name] or _closest(name, list(keys))
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"keys of {section}: {_listed(_keys_of(section))}" if same else f"the sections are {', '.join(sections)}"


def explain(errors: Sequence[ErrorDetails], places: dict[str, str], path: str) -> str:
    """The most telling of pydantic's errors as one line. An unknown key comes first: it explains the missing ones."""
    unknown = ("extra_forbidden", "invalid_key")
    error = min(errors, key=lambda one: (one["type"] == "missing", one["type"] not in unknown))
    parts = [str(part) for part in error["loc"] if not str(part).startswith("<")]  # schema.py marks forms of a key so
    key = ".".join(parts)
    ancestors = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    within = next((name for name in places if name.startswith(f"{key}.")), key)  # where an override gave a part of it
    place = next((places[name] for name in (key, within, *ancestors) if name in places), path)
    known = known_keys()
    if error["type"] in unknown:
        return line(place, _unknown(parts, known))
    meaning = next((known[name] for name in ancestors if name in known), "")
    if error["type"] == "missing":
        if len(parts) == 1:
            return line(place, f"section {key} is missing; it needs {_needed(key)}")
        if len(parts) > 2 and not parts[-1].isdigit():
            return line(place, f"{short(key)} is missing ({meaning}); add it")
        if key in known:
            section = ".".join(parts[:-1])
            return line(place, f"{key} is missing from section {section}{f' ({meaning})' if meaning else ''}; add it")
    value = _written(error["input"])
    if error["type"] in ("model_type", "dict_type") and len(parts) < 3:
        return line(place, f"{key}: {value} must be a section with keys {_listed(_keys_of(key)) or 'of DeepSpeed'}")
    rule = _RULES.get(error["type"]) or error["msg"].removeprefix("Input ").replace("\n", " ")
    most = error.get("ctx", {}).get("le")
    if isinstance(most, float):  # pydantic writes all of its digits
        rule = f"should be less than or equal to {most:g}"
    entry = _keys_of_entry(parts[0], ".".join(parts[1:])) if error["type"] == "model_type" else []
    entries = error["type"] == "list_type" and _keys_of_entry(parts[0], ".".join([*parts[1:], "0"]))
    keys = f" with the keys {_listed(entry)}" if entry else ""
    text = f"{short(key)}: {value} {rule}{keys}{'' if entries else _hint(error)}"
    return line(place, f"{text} ({meaning})" if meaning else text)


_RULES = {
    "missing": "has too few values",
    "too_long": "has too many values",
    "tuple_type": "should be a list",
    "model_type": "should be a mapping",
}


def _unknown(parts: list[str], known: dict[str, str]) -> str:
    key, parent = ".".join(parts), ".".join(parts[:2])
    if len(parts) > 2 and parent in known and not _keys_of_entry(parts[0], ".".join(parts[1:])):
        return f"unknown key {short(key)}; {parent} is the {known[parent]}"
    name, colon, _ = parts[-1].partition(":")
    if colon and ".".join([*parts[:-1], name]) in known:
        return f"unknown key {short(key)}; write a space after the colon"
    return f"unknown key {short(key)}; {nearest(short(key))}"


def _hint(error: ErrorDetails) -> str:
    """What to write, where the value says it."""
    kind, value = error["type"], error["input"]
    if kind == "bool_type":
        meant = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(str(value).lower(), str(value).lower())
        return f"; write {meant if meant in ('true', 'false') and isinstance(value, str) else 'true or false'}"
    if kind in ("list_type", "tuple_type") and isinstance(value, int | float | str) and value != "":
        return f"; write [{short(str(value))}]"
    if kind in ("int_type", "int_from_float", "float_type"):
        whole = kind != "float_type"
        number = _number(value, whole)
        quoted = isinstance(value, str) and str(number) == value
        return "" if number is None else f"; write {short(str(number))}{' without quotes' if quoted else ''}"
    return ""


def _number(value: Any, whole: bool) -> int | float | None:
    """The number that a value means, which is written in a form that YAML does not read as one (1,000 or '3')."""
    try:
        if isinstance(value, str):
            value = float(value.replace(",", "").replace(" ", ""))
        if isinstance(value, float) and whole:
            return int(value) if value.is_integer() else None
        return value if isinstance(value, float) and math.isfinite(value) else None
    except (ValueError, OverflowError):
        return None


def _written(value: Any) -> str:
    """A value as a message repeats it: YAML's words for what has one."""
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else short(repr(value))
    )


def _needed(section: str) -> str:
    """The keys of a section that have no default; where all have one, some of its keys."""
    kind = _section_of(RunConfig.model_fields[section].annotation)
    needed = [name for name, field in kind.model_fields.items() if field.is_required()] if kind else []
    return _listed(needed or _keys_of(section))


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    return ", ".join(keys[:_MOST_KEYS]) + more


def _keys_of(section: str) -> list[str]:
    return list(map(_name, _inside(section)))


def _inside(section: str) -> list[str]:
    """Dotted keys of a section, without those of the sections within it."""
    return [known for known in known_keys() if known.rpartition(".")[0] == section]


def _keys_of_entry(section: str, name: str) -> list[str]:
    """Keys of the entries of a list of sections, where `name` is one of an entry (`added.0.rows`)."""
    field, number, *_ = [*name.split("."), ""]
    kind = getattr(RunConfig.model_fields.get(section), "annotation", None)
    if not number.isdigit() or not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return []
    inside = [
        one
        for one in (get_args(kind.model_fields[field].annotation) if field in kind.model_fields else ())
        if isinstance(one, type) and issubclass(one, BaseModel)
    ]
    return list(inside[0].model_fields) if inside else []


def _name(key: str) -> str:
    return key.split(".")[-1]


def _closest(name: str, keys: Sequence[str]) -> list[str]:
    by_name = {_name(known): known for known in reversed(keys)}
    return [by_name[match] for match in difflib.get_close_matches(name, by_name, n=1, cutoff=0.65)]
