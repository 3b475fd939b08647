"""How often a training step waits for the device, and where.

torch warns of operators that wait. Calls of `synchronize` of the device, a stream or an event are counted beside it, because
torch does not warn of all of them. A wait belongs to the innermost function of overtok_megatron or of DeepSpeed that asked for
it.
"""

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import overtok_megatron
from gpu_checks.registry import Context, Result
from gpu_checks.training import Settings, engine_of, made_tokens, own_part, small_configuration
from overtok_megatron.parallel.uploading import moved

ALLOWED = 3  # waits of overtok_megatron per step
_OURS = str(Path(overtok_megatron.__file__).parent)
_WAYS: dict[str, Settings] = {
    "zero 1": {"parallel.zero_stage": 1},
    "zero 2": {"parallel.zero_stage": 2},
    "zero 3": {"parallel.zero_stage": 3},
    "experts": {
        "parallel.zero_stage": 1,
        "model.num_experts": 4,
        "model.num_experts_per_token": 2,
        "model.intermediate_size": 48,
    },
}


@dataclass(frozen=True, order=True)
class Place:
    """A function that waited. file: relative to its package. ours: whether that is overtok_megatron."""

    ours: bool
    file: str
    function: str

    def __str__(self) -> str:
        return f"{self.file} {self.function}"


def innermost_place(depth: int) -> Place:
    """The innermost function of overtok_megatron or DeepSpeed on the stack, from `depth` callers above this function on."""
    frame: Any = sys._getframe(depth)
    outside = frame.f_code
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_OURS):
            return Place(True, str(path.relative_to(_OURS)), frame.f_code.co_name)
        # deepspeed/accelerator only hands calls on to torch
        if "deepspeed" in path.parts and path.parent.name != "accelerator":
            file = "/".join(path.parts[path.parts.index("deepspeed") + 1 :])
            return Place(False, file, frame.f_code.co_name)
        frame = frame.f_back
    return Place(True, outside.co_filename, outside.co_name)


class ExplicitWaits:
    """Replacements of functions whose only purpose is to wait; each call is counted by the place that asked for it."""

    def __init__(self, places: Counter[Place]) -> None:
        self._places = places
        self._waiting: set[int] = set()  # threads that are in one of the functions

    def is_waiting(self) -> bool:
        """Whether the calling thread is in one of the functions, so that the wait is counted already."""
        return threading.get_ident() in self._waiting

    def counted(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, which counts its calls, but not those that it makes itself of another one."""

        def count_and_wait(*args: Any, **others: Any) -> None:
            if self.is_waiting():
                return function(*args, **others)
            self._places[innermost_place(2)] += 1
            self._waiting.add(threading.get_ident())
            try:
                return function(*args, **others)
            finally:
                self._waiting.remove(threading.get_ident())

        return count_and_wait


@contextmanager
def explicit_waits_counted(places: Counter[Place], owners: list[Any]) -> Iterator[ExplicitWaits]:
    """Counts the calls of `synchronize` of each owner: a module, a class, or an object."""
    explicit = ExplicitWaits(places)
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(mock.patch.object(owner, "synchronize", explicit.counted(owner.synchronize)))
        yield explicit


@contextmanager
def counted_on_cuda() -> Iterator[Counter[Place]]:
    """Counts the waits of all threads."""
    places: Counter[Place] = Counter()
    before = torch.cuda.get_sync_debug_mode()
    owners = [torch.cuda, torch.cuda.Stream, torch.cuda.Event]
    with warnings.catch_warnings(), explicit_waits_counted(places, owners) as explicit:
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: (
            places.update([innermost_place(2)])
            if "synchronizing CUDA operation" in str(message) and not explicit.is_waiting()
            else None
        )
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)


def waits(context: Context) -> Result:
    """At most ALLOWED waits of overtok_megatron in a step, whatever the ZeRO stage; those of DeepSpeed are listed."""
    numbers = {}
    most = 0
    for name, way in _WAYS.items():
        config = small_configuration(context, context.cuda, way | {"training.precision": "bf16"})
        engine = engine_of(context, config)
        hosts = [own_part(engine, tokens) for tokens in made_tokens(context, config, 4)]
        engine.announce(hosts[0])
        for step in range(3):
            engine.announce(hosts[step + 1])
            tokens = moved(hosts[step], engine.device)
            with counted_on_cuda() as places:
                engine.step(tokens, 1e-3)
        ours = {str(place): count for place, count in places.items() if place.ours}  # of the last step
        most = max(most, sum(ours.values()))
        numbers[name] = {
            "ours": ours,
            "DeepSpeed's": {str(place): count for place, count in places.items() if not place.ours},
        }
        del engine
    theirs = {name: sum(found["DeepSpeed's"].values()) for name, found in numbers.items()}
    return Result(most <= ALLOWED, f"{most} per step; DeepSpeed's: {theirs}", f"{ALLOWED}", numbers)
