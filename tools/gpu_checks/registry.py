"""What a check is: a function of a `Context` that returns a `Result`, with its name and its limits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Status = Literal["passed", "failed", "measured", "skipped", "not run"]


@dataclass(frozen=True)
class Context:
    """Where a check runs.

    device: of this process. ranks, rank: the processes that run the check together, and which one this is. quick: the short
    form was asked for. folder: scratch space that all processes of one call of the tool share.
    """

    device: torch.device
    folder: Path
    quick: bool = False
    ranks: int = 1
    rank: int = 0

    @property
    def cuda(self) -> bool:
        """Whether full sizes are wanted; on the CPU everything is small."""
        return self.device.type == "cuda"

    @property
    def batch(self) -> int:
        """Sequences per step in the training checks: at least eight, and every number of ranks divides it."""
        return self.ranks * -(-8 // self.ranks)


@dataclass(frozen=True)
class Result:
    """What a check found. passed: None where a figure was measured and nothing was asserted.

    figure: the measured value in words; limit: what it is to be held against. numbers: the same and more, for the JSON file.
    """

    passed: bool | None
    figure: str
    limit: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One line of the table.

    seconds: the limit after which the check counts as failed. ranks: "one" process, "many" (with --processes), or "any".
    quick: part of --quick. cuda: says something only on a CUDA device. fresh: wants a new process with an empty device.
    references: compares with losses of the CPU process (see configurations.py).
    """

    name: str
    function: Callable[[Context], Result]
    seconds: float
    ranks: Literal["one", "many", "any"] = "one"
    quick: bool = True
    cuda: bool = False
    fresh: bool = False
    references: bool = False


@dataclass(frozen=True)
class Outcome:
    """A result, with what became of the check. traceback: of the first process that failed, or the end of its output."""

    name: str
    status: Status
    figure: str = ""
    limit: str = ""
    seconds: float = 0.0
    traceback: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
