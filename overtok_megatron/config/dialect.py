"""The YAML that configurations are written in: numbers and booleans of YAML 1.2, no key twice, a line for every key.

What the keys mean is not known here, but in loading.py.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from overtok_megatron.config.wording import line, printable, short
from overtok_megatron.errors import ConfigError

LARGEST_FILE = 256 * 1024  # bytes; a file beyond is a weight or a corpus whose name was given by mistake
MOST_NODES = 20_000  # keys and values once every alias is written out: a few lines of aliases can stand for billions
_LONGEST_INTEGER = 300  # characters; a longer number is above the largest float, and so above any size

_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")  # neither 010 = 8 nor 1:30 = 90
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_DIALECT = (("float", _FLOAT, "-+0123456789."), ("int", _INT, "-+0123456789"), ("bool", _BOOL, "tTfF"))
_MERGE = "tag:yaml.org,2002:merge"
_REPLACED = tuple(f"tag:yaml.org,2002:{name}" for name in ("float", "int", "bool", "timestamp"))

_WAYS_OUT = {  # by words of PyYAML's
    "'\\t'": "indent with spaces, not with tabs",
    "mapping values are not allowed": "check the indentation, and quote a text with a colon in it",
    "could not find expected ':'": "write key: value",
    "another document": "remove the line ---, one file is one configuration",
    "<stream end>": "close the bracket or the quote",
    "found unexpected end of stream": "close the quote",
    "<document start>": "give the YAML file of a run",
    "special characters": "remove it, or give a text file",
    "undefined alias": "quote a text that begins with *",
}


class Loader(yaml.SafeLoader):
    """`1e-4` is a number, `on` and `no` are words, a date is a string."""


class Dumper(yaml.SafeDumper):
    """Quotes whatever this dialect or YAML 1.1 would not read back as a string."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, expression) for tag, expression in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _expression, _first in _DIALECT:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _expression, list(_first))
    Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _expression, list(_first))


def read(path: Path) -> tuple[Any, dict[str, str]]:
    """What `parse` returns for a file. Raises ConfigError where it cannot be read, or is not a text in UTF-8."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(line(path, "no such configuration file")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(line(path, f"cannot be read ({reason}); give the path of a YAML file")) from None
    if len(content) > LARGEST_FILE:
        raise ConfigError(line(path, f"is larger than {LARGEST_FILE} bytes; give the YAML file of a run"))
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(line(path, "is UTF-16; save it as UTF-8"))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(line(path, f"not UTF-8 at byte {error.start}; save it as UTF-8")) from None
    return parse(text, str(path))


def parse(text: str, source: str, *, lines: bool = True) -> tuple[Any, dict[str, str]]:
    """The value of a text, no part of it shared with another, and for every dotted key in it "source:line".

    Raises ConfigError, one line, where the text is not YAML, gives a key twice, or contains itself. lines: whether
    origins name the line (a file) or only the source (an override).
    """
    walk = _Walk(printable(source), lines)
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        origins = {key: walk.at(mark) for key, mark in walk.keys(node, "", ())}
        return _unshared(loader.construct_document(node)), origins
    except yaml.MarkedYAMLError as error:
        raise ConfigError(line(walk.at(error.problem_mark), f"not valid YAML: {_explained(error)}")) from None
    except RecursionError:
        raise ConfigError(line(source, "nested too deeply; a configuration needs sections and keys only")) from None
    except yaml.YAMLError as error:
        raise ConfigError(line(source, f"not valid YAML: {_explained(error)}")) from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
        # PyYAML's constructors raise these for a tag whose value does not fit, as in `!!int x` or `!!bool maybe`
        raise ConfigError(line(source, "not valid YAML: a `!!` tag does not fit its value; remove the tag")) from None


def unwritable(value: Any) -> str | None:
    """The first part of a value that JSON cannot hold (a set, infinity, a key that is not a string) as text, or None."""
    if isinstance(value, dict):
        bad_key = next((key for key in value if not isinstance(key, str)), "")
        if bad_key != "":
            return f"the key {short(repr(bad_key))}"
        return next((bad for item in value.values() if (bad := unwritable(item)) is not None), None)
    if isinstance(value, list):
        return next((bad for item in value if (bad := unwritable(item)) is not None), None)
    if isinstance(value, float) and math.isfinite(value):
        return None
    return None if value is None or isinstance(value, str | int) else short(repr(value))


def _explained(error: yaml.YAMLError) -> str:
    """PyYAML's two sentences as one, and what to write instead."""
    parts = (error.context, error.problem) if isinstance(error, yaml.MarkedYAMLError) else (error,)
    told = ", ".join(short(_one_line(part)) for part in parts if part)
    return told + next((f"; {way_out}" for words, way_out in _WAYS_OUT.items() if words in told), "")


def _one_line(problem: object) -> str:
    return (str(problem).splitlines() or ["unreadable"])[0]


def _unshared(value: Any) -> Any:
    """A copy in which an alias is a value of its own: an override of one key must not change another."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


class _Walk:
    """A way through the nodes of one text: finds its keys, and what must not be in it."""

    def __init__(self, source: str, lines: bool) -> None:
        self._source = source
        self._lines = lines
        self._nodes = 0

    def at(self, mark: yaml.Mark | None) -> str:
        """The origin that messages name."""
        return f"{self._source}:{mark.line + 1}" if self._lines and mark is not None else self._source

    def keys(self, node: yaml.Node, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, yaml.Mark]]:
        """Every dotted key below a node, with where it stands. `above`: identities of the nodes around it."""
        if id(node) in above:
            raise self._refuse(node, "an anchor that contains itself; write the value out")
        self._nodes += 1
        if self._nodes > MOST_NODES:
            raise self._refuse(node, f"aliases stand for more than {MOST_NODES} values; write out what is needed")
        above = (*above, id(node))
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:  # keys in lists have no dotted name, but may not repeat either
                for _ in self.keys(item, prefix, above):
                    pass
        elif isinstance(node, yaml.MappingNode):
            yield from self._pairs(node, prefix, above)

    def _pairs(self, node: yaml.MappingNode, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, yaml.Mark]]:
        first: dict[str, int] = {}
        for key_node, value_node in sorted(
            node.value, key=lambda pair: pair[0].tag != _MERGE
        ):  # what `<<` brings, first
            if key_node.tag == _MERGE:
                merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for one in merged:
                    yield from self.keys(one, prefix, above)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._refuse(
                    key_node, "a list or a mapping stands where a key must; write a word before the colon"
                )
            self._check_scalar(key_node)
            key, mark = f"{prefix}{key_node.value}", key_node.start_mark
            if key in first:
                raise self._refuse(key_node, f"{short(key)} is given twice (first on line {first[key]}); remove one")
            first[key] = mark.line + 1
            yield key, mark
            yield from self.keys(value_node, f"{key}.", above)

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        odd = next((one for one in node.value if one == "\0" or "\ud800" <= one <= "\udfff"), None)
        if odd is not None:
            raise self._refuse(node, f"the character {printable(odd)} in {short(node.value)}; remove it")
        if node.tag.endswith(":int") and len(node.value) > _LONGEST_INTEGER:
            raise self._refuse(
                node, f"an integer of {len(node.value)} digits, {short(node.value, 20)}; write a smaller one"
            )

    def _refuse(self, node: yaml.Node, problem: str) -> ConfigError:
        return ConfigError(line(self.at(node.start_mark), problem))
