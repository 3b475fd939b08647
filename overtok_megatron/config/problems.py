"""What the rules across keys find wrong, and how all of it becomes one error with a line for each problem."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from overtok_megatron.config.loading import COMMAND_LINE, DEFAULT
from overtok_megatron.config.wording import line, short
from overtok_megatron.errors import ConfigError

PROCESSES = "--processes"  # the option that gives the number of ranks; rules name it as they name a key

Locate = Callable[[str], str]  # where a dotted key was given, as LoadedConfig.locate


@dataclass(frozen=True)
class Problem:
    """The value of `key` breaks a rule. message: the value, the reason and what works instead.

    reads: other keys that the rule reads. While one of them has a problem of its own, this one may only follow from it.
    """

    key: str
    message: str
    reads: tuple[str, ...] = ()


def problem(key: str, value: object, reason: str, reads: tuple[str, ...] = ()) -> Problem:
    """A Problem whose message is "value; reason"."""
    return Problem(key, f"{short(str(value))}; {reason}", reads)


def refuse(problems: Iterable[Problem], locate: Locate) -> None:
    """Raise ConfigError where there are problems: a line for each in their order, with where its key was given.

    A key is named once, and not for a rule that reads a key named before: whether that rule holds is not known until the other
    key has been corrected.
    """
    wrong: dict[str, str] = {}
    for one in problems:
        if wrong.keys().isdisjoint((one.key, *one.reads)):
            wrong[one.key] = line(_origin(one.key, locate), f"{short(one.key)}: {one.message}")
    if wrong:
        raise ConfigError(*wrong.values())


def _origin(key: str, locate: Locate) -> str:
    """Where a key was given; where nobody gave it, its section. An option is given on the command line."""
    if key.startswith("--"):
        return COMMAND_LINE
    origin = locate(key)
    return locate(key.partition(".")[0]) if origin == DEFAULT else origin
