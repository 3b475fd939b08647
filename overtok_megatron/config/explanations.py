"""What does not fit the schema, a line for each key: origin, key, value, what is allowed, the nearest known key."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from overtok_megatron.config.known_keys import (
    keys_of,
    keys_of_entry,
    known_keys,
    listed,
    required_keys,
    similar_keys,
    suggestion,
)
from overtok_megatron.config.wording import line, short

MOST_TOLD = 30  # keys that an error names; the writer of more has given a wrong file
_RULES = {
    "missing": "has too few values",
    "too_long": "has too many values",
    "tuple_type": "should be a list",
    "model_type": "should be a mapping",
}


@dataclass(frozen=True)
class _Mistake:
    """One of pydantic's errors. parts: of its dotted key, numbers of entries included."""

    error: ErrorDetails
    parts: list[str]

    @property
    def kind(self) -> str:
        return self.error["type"]

    @property
    def key(self) -> str:
        return ".".join(self.parts)

    @property
    def unknown(self) -> bool:
        """Whether the schema has no such key."""
        return self.kind in ("extra_forbidden", "invalid_key")

    @property
    def missing(self) -> bool:
        """Whether a key or section is absent; a list with too few values is not."""
        return self.kind == "missing" and not self.key.rpartition(".")[2].isdigit()

    @property
    def ancestors(self) -> list[str]:
        """The key, and what it is a part of, the innermost first."""
        return [".".join(self.parts[:end]) for end in range(len(self.parts), 0, -1)]

    @property
    def subject(self) -> str:
        """The key to which a line is given: what is wrong within a value counts for the value."""
        return self.key if self.unknown else next((one for one in self.ancestors if one in known_keys()), self.key)

    @property
    def meaning(self) -> str:
        """The schema's description of the key, or of what it is a part of."""
        return next((known_keys()[one] for one in self.ancestors if one in known_keys()), "")


def explain(errors: Sequence[ErrorDetails], origins: dict[str, str], path: str) -> list[str]:
    """A line for each key that pydantic's errors are about: unknown keys, then wrong values, then missing keys.

    origins: where each dotted key was given; path: what stands for the origin of a missing key. A key is not called missing
    where an unknown one, beside it or with a similar name, may be meant for it.
    """
    # schema.py marks the forms of a key by <..>
    mistakes = [_Mistake(one, [str(part) for part in one["loc"] if not str(part).startswith("<")]) for one in errors]
    mistakes.sort(key=lambda one: (one.kind == "missing", not one.unknown))
    first: dict[str, _Mistake] = {}
    for mistake in _independent(mistakes):
        first.setdefault(mistake.subject, mistake)
    lines = [line(_origin(mistake, origins, path), _text(mistake)) for mistake in [*first.values()][:MOST_TOLD]]
    if len(first) > MOST_TOLD:
        lines.append(line(path, f"{len(first) - MOST_TOLD} more keys are wrong or missing; correct these first"))
    return lines


def _independent(mistakes: Sequence[_Mistake]) -> Iterator[_Mistake]:
    """Without missing keys that an unknown one explains."""
    unknown = [mistake for mistake in mistakes if mistake.unknown]
    parents = {tuple(mistake.parts[:-1]) for mistake in unknown}
    meant = {key for mistake in unknown[:MOST_TOLD] for key in similar_keys(short(mistake.key))}
    meant |= {key.partition(".")[0] for key in meant}
    for mistake in mistakes:
        if not (mistake.missing and (tuple(mistake.parts[:-1]) in parents or mistake.key in meant)):
            yield mistake


def _origin(mistake: _Mistake, origins: dict[str, str], path: str) -> str:
    key = mistake.key
    within = next((name for name in origins if name.startswith(f"{key}.")), key)  # where an override gave a part of it
    return next((origins[name] for name in (key, within, *mistake.ancestors) if name in origins), path)


def _text(mistake: _Mistake) -> str:
    if mistake.unknown:
        return _unknown_key(mistake.parts)
    if mistake.missing and (text := _missing_key(mistake)) is not None:
        return text
    return _wrong_value(mistake)


def _unknown_key(parts: list[str]) -> str:
    key, parent, known = ".".join(parts), ".".join(parts[:2]), known_keys()
    if len(parts) > 2 and parent in known and not keys_of_entry(parts[0], ".".join(parts[1:])):
        return f"unknown key {short(key)}; {parent} is the {known[parent]}"
    name, colon, _ = parts[-1].partition(":")
    if colon and ".".join([*parts[:-1], name]) in known:
        return f"unknown key {short(key)}; write a space after the colon"
    return f"unknown key {short(key)}; {suggestion(short(key))}"


def _missing_key(mistake: _Mistake) -> str | None:
    key, parts, meaning = mistake.key, mistake.parts, mistake.meaning
    if len(parts) == 1:
        return f"section {key} is missing; it needs {listed(required_keys(key))}"
    if len(parts) > 2:
        return f"{short(key)} is missing ({meaning}); add it"
    if key in known_keys():
        return f"{key} is missing from section {parts[0]}{f' ({meaning})' if meaning else ''}; add it"
    return None


def _wrong_value(mistake: _Mistake) -> str:
    error, key, parts, meaning = mistake.error, mistake.key, mistake.parts, mistake.meaning
    value = _written(error["input"])
    section, _, within = key.partition(".")
    if mistake.kind in ("model_type", "dict_type") and len(parts) < 3:
        return f"{key}: {value} must be a section with keys {listed(keys_of(key)) or 'of DeepSpeed'}"
    entry = keys_of_entry(section, within) if mistake.kind == "model_type" else []
    keys = f" with the keys {listed(entry)}" if entry else ""
    of_sections = mistake.kind == "list_type" and keys_of_entry(section, f"{within}.0")
    text = f"{short(key)}: {value} {_rule(error)}{keys}{'' if of_sections else _hint(error)}"
    return f"{text} ({meaning})" if meaning else text


def _rule(error: ErrorDetails) -> str:
    """What is allowed, in words."""
    most = error.get("ctx", {}).get("le")
    if isinstance(most, float):  # pydantic writes all of its digits
        return f"should be less than or equal to {most:g}"
    return _RULES.get(error["type"]) or error["msg"].removeprefix("Input ").replace("\n", " ")


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
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    return short(repr(value))
