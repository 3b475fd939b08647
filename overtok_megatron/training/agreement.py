"""A failure of one rank becomes an error on every rank: a rank that left alone would leave the others waiting for it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from overtok_megatron.errors import CheckpointError, OvertokError
from overtok_megatron.parallel.grid import ProcessGrid

T = TypeVar("T")
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
READ_ERRORS = (OSError, SafetensorError)


def reason(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def agree(grid: ProcessGrid, work: Callable[[], T], path: Path) -> T:
    """Return what `work` returns; where it fails on any rank, raise CheckpointError on all, which must all call this.

    work: must not wait for other ranks. path: what the message names where a rank cannot read.
    """
    failure: str | None = None
    found: list[T] = []
    try:
        found.append(work())
    except OvertokError as error:
        failure = str(error)
    except READ_ERRORS as error:  # a file that went away, a disk that fails
        failure = f"{path}: rank {grid.rank} failed ({reason(error)}); the checkpoints are as they were"
    for text in grid.gather_objects(failure):
        if text:
            raise CheckpointError(text)
    return found[0]
