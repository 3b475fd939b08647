"""A device that, as a GPU, only notes what it is asked for, and does it later: in any order that streams and marks allow.

Its tensors hold their values in `memory`. Reading a value on the host, which on a GPU would wait, raises `WaitedError`. Memory
that was freed while another stream than its own had yet to use it counts as used anew, as torch's allocator would.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from overtok_megatron.parallel.copy_stream import CopyStream

POISON = 77  # what memory holds that nobody has written to, or that belongs to somebody else by now


class WaitedError(AssertionError):
    """The host asked for a value, or for a copy to or from memory of the device without `non_blocking`."""


@dataclass
class Memory:
    """What tensors lie in. values: all of it. stream: in which it was allocated."""

    values: Tensor
    stream: str


@dataclass
class LateMark:
    """A moment in a stream; see copy_stream.Mark."""

    device: "LateDevice"
    has_come: bool = False

    def query(self) -> bool:
        return self.has_come

    def synchronize(self) -> None:
        self.device.pause()
        if threading.current_thread() is threading.main_thread():
            raise WaitedError("the training thread waits for the device")
        while not self.has_come:
            self.device.advance()
            self.device.pause()

    def wait(self) -> None:
        self.device.pause()
        self.device.launch(self)
        self.device.pause()


@dataclass
class LateDevice:
    """Streams by name. Each has a queue of work, and of marks for which it waits; `dice` chooses which stream goes on."""

    dice: Random
    queues: dict[str, deque[Callable[[], object] | LateMark]] = field(default_factory=dict)
    pause: Callable[[], object] = lambda: None  # called wherever another thread might go on
    _local: threading.local = field(default_factory=threading.local)

    @property
    def current(self) -> str:
        """The calling thread's current stream."""
        return getattr(self._local, "stream", threading.current_thread().name)

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        before, self._local.stream = self.current, name
        yield
        self._local.stream = before

    def launch(self, work: Callable[[], object] | LateMark) -> None:
        """Note work for the current stream, or that it has to wait for a mark."""
        self.queues.setdefault(self.current, deque()).append(work)

    def mark(self) -> LateMark:
        found = LateMark(self)
        self.launch(lambda: setattr(found, "has_come", True))
        return found

    def advance(self) -> bool:
        """Do one thing that may be done; False where there is none."""
        able = [queue for queue in self.queues.values() if queue and getattr(queue[0], "has_come", True)]
        if not able:
            assert not any(self.queues.values()), "streams wait for each other"
            return False
        work = self.dice.choice(able).popleft()
        if not isinstance(work, LateMark):
            work()
        return True

    def put(self, values: Tensor) -> "LateTensor":
        """A tensor of this device that holds a copy of the values already."""
        return LateTensor(values.clone(), Memory(values, self.current), self)


class LateTensor(Tensor):
    """A tensor of a LateDevice. values: where its values are or will be, in `memory`.

    torch calls its device `meta`: on the CPU, it would read some values without asking.
    """

    values: Tensor
    memory: Memory
    owner: LateDevice

    @staticmethod
    def __new__(cls, values: Tensor, memory: Memory, owner: LateDevice) -> "LateTensor":
        made: LateTensor = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device="meta"
        )  # type: ignore[attr-defined]
        made.values, made.memory, made.owner = values, memory, owner
        return made

    def __repr__(self, **_: Any) -> str:  # torch's would read the values
        return f"LateTensor{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mine = [part for part in (*args, *kwargs.values()) if isinstance(part, LateTensor)]
        owner = mine[0].owner
        if func.is_view:
            return LateTensor(func(*tree_map(_values, args), **kwargs), mine[0].memory, owner)
        if waits(func, args, kwargs):
            raise WaitedError(str(func))
        if func._schema.is_mutable:
            owner.launch(_work(func, args, kwargs, None, owner))
            return args[0]
        shaped = func(*tree_map(_shape_only, args), **kwargs)
        result = torch.full(shaped.shape, POISON).to(shaped.dtype)
        owner.launch(_work(func, args, kwargs, result, owner))
        return LateTensor(result, Memory(result, owner.current), owner)


def waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator on tensors of a GPU makes the host wait: for a value, a size, or a copy."""
    if func is torch.ops.aten.copy_.default:
        return not (kwargs.get("non_blocking") or args[2:] == (True,))
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    return bool(tags) or func is torch.ops.aten._to_copy.default


def _values(part: Any) -> Any:
    return part.values if isinstance(part, LateTensor) else part


def _shape_only(part: Any) -> Any:
    return part.values.to("meta") if isinstance(part, LateTensor) else part


def _work(func: Any, args: Any, kwargs: Any, result: Tensor | None, owner: LateDevice) -> Callable[[], object]:
    """Call `func` when it is the turn of the present stream. It finds nothing in memory that was freed by then."""
    stream = owner.current

    def late(part: Any) -> Callable[[], Any]:
        if not isinstance(part, LateTensor):
            return lambda: part
        values, freed = part.values, weakref.ref(part.memory)
        if part.memory.stream == stream:
            return lambda: values
        return lambda: values if freed() is not None else torch.zeros_like(values)

    parts = [late(part) for part in args]

    def work() -> None:
        done = func(*(part() for part in parts), **kwargs)
        if result is not None:
            result.copy_(done)

    return work


class LateCopies(CopyStream):
    """The copy stream of a LateDevice."""

    def __init__(self, owner: LateDevice) -> None:
        super().__init__(torch.device("cpu"))
        self.is_host = False
        self._owner = owner

    def follow_compute(self) -> None:
        self._owner.pause()
        so_far = self._owner.mark()
        with self._owner.stream("copies"):
            self._owner.launch(so_far)
        self._owner.pause()

    def mark(self) -> LateMark:  # type: ignore[override]
        self._owner.pause()
        with self._owner.stream("copies"):
            found = self._owner.mark()
        self._owner.pause()
        return found

    def buffer(self, like: Tensor, count: int | None = None) -> Tensor:
        shape = like.shape if count is None else (count, *like.shape[1:])
        return torch.full(shape, POISON).to(like.dtype)

    @contextmanager
    def _current(self) -> Iterator[None]:  # type: ignore[override]
        self._owner.pause()
        with self._owner.stream("copies"):
            yield
        self._owner.pause()

    def _keep(self, tensor: Tensor) -> None:
        assert isinstance(tensor, LateTensor)
        memory = [tensor.memory]
        with self._owner.stream("copies"):
            self._owner.launch(memory.clear)  # held until then
