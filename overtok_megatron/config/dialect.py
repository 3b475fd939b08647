"""The YAML that configurations are written in: numbers and booleans of YAML 1.2, no key twice, a line for every key.

What the keys mean is not known here: that is loading.py.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from overtok_megatron.errors import ConfigError

_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")  # neither 010 = 8 nor 1:30 = 90
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_DIALECT = (("float", _FLOAT, "-+0123456789."), ("int", _INT, "-+0123456789"), ("bool", _BOOL, "tTfF"))
_MERGE = "tag:yaml.org,2002:merge"
_REPLACED = tuple(f"tag:yaml.org,2002:{name}" for name in ("float", "int", "bool", "timestamp"))


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


def parse(text: str, source: str, *, lines: bool = True) -> tuple[Any, dict[str, str]]:
    """The value of a text, and for every dotted key in it "source:line".

    Raises ConfigError, one line, where the text is no YAML, gives a key twice, or contains itself. lines: whether
    places name the line (a file) or only the source (an override).
    """

    def at(mark: yaml.Mark | None) -> str:
        return f"{source}:{mark.line + 1}" if lines and mark is not None else source

    try:
        node = yaml.compose(text, Loader=Loader)
        places = {} if node is None else {key: at(mark) for key, mark in _walk(node, "", (), at)}
        return yaml.load(text, Loader=Loader), places
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{at(error.problem_mark)}: not valid YAML: {_one_line(error.problem)}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{source}: not valid YAML: {_one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply; a configuration needs sections and keys only") from None


def unwritable(value: Any) -> Any:
    """The first part of a value that JSON cannot hold (a date, a set, infinity), or None."""
    if isinstance(value, dict):
        return next((bad for item in value.values() if (bad := unwritable(item)) is not None), None)
    if isinstance(value, list):
        return next((bad for item in value if (bad := unwritable(item)) is not None), None)
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    return None if value is None or isinstance(value, str | int) else value


def _one_line(problem: object) -> str:
    return (str(problem).splitlines() or ["unreadable"])[0]


def _walk(
    node: yaml.Node, prefix: str, above: tuple[int, ...], at: Callable[[yaml.Mark | None], str]
) -> Iterator[tuple[str, yaml.Mark]]:
    if id(node) in above:
        raise ConfigError(f"{at(node.start_mark)}: an anchor that contains itself; write the value out")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:  # keys in lists have no dotted name, but may not repeat either
            for _ in _walk(item, prefix, above, at):
                pass
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key_node, value_node in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE):  # what `<<` brings, first
        if key_node.tag == _MERGE:
            yield from _walk(value_node, prefix, above, at)
            continue
        key, mark = f"{prefix}{key_node.value}", key_node.start_mark
        if key in first:
            raise ConfigError(f"{at(mark)}: {key} is given twice (first on line {first[key]}); remove one")
        first[key] = mark.line + 1
        yield key, mark
        yield from _walk(value_node, f"{key}.", above, at)
