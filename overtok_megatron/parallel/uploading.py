"""Copies of what a thread makes on the host, on the model's device, without a wait of the host for the device.

On a GPU they are made on a stream of their own, from pinned memory. Whoever uses them first makes its own stream wait for them,
which the host does not notice. Where the model computes on the host, nothing is copied.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_ALIGNED = 16  # int64 values: kernels load from multiples of 128 bytes


class Upload:
    """Copies tensors from the host to `device`; for one thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own_stream: torch.cuda.Stream | None = None  # made by the thread that copies

    def stream(self) -> AbstractContextManager[Any]:
        """A context in which operators run on the stream of the copies."""
        if self.device.type == "cpu":
            return nullcontext()
        if self._own_stream is None:
            self._own_stream = torch.cuda.Stream(self.device)
        return torch.cuda.stream(self._own_stream)

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor on the device."""
        with self.stream():
            return moved(tensor, self.device)

    def copy_integers(self, value: T) -> T:
        """A dataclass with its int64 tensors, and those of dataclasses in it, on the device: they travel as one copy."""
        if self.device.type == "cpu":
            return value
        packed, starts = pack(value, pinned=self.device.type == "cuda")
        with self.stream():
            return unpack(value, packed.to(self.device, non_blocking=True), starts)

    def end(self) -> "torch.cuda.Event | None":
        """Marks the end of all copies so far, for `use`; None where nothing is copied."""
        return None if self._own_stream is None else self._own_stream.record_event()


def pack(value: Any, *, pinned: bool) -> tuple[Tensor, dict[int, int]]:
    """The int64 tensors of a dataclass in one tensor, and where in it each starts, by the id of the tensor."""
    found = {id(tensor): tensor for tensor in _tensors(value)}
    starts, end = {}, 0
    for key, tensor in found.items():
        assert tensor.dtype == torch.int64, tensor.dtype
        starts[key] = end
        end += -(-tensor.numel() // _ALIGNED) * _ALIGNED
    packed = torch.empty(end, dtype=torch.int64, pin_memory=pinned)
    for key, tensor in found.items():
        packed[starts[key] : starts[key] + tensor.numel()] = tensor.reshape(-1)
    return packed, starts


def unpack(value: T, packed: Tensor, starts: dict[int, int]) -> T:
    """The dataclass that `pack` was given, with views of a copy of its result in the place of the tensors."""
    if isinstance(value, Tensor):
        start = starts[id(value)]
        return packed[start : start + value.numel()].view(value.shape)  # type: ignore[return-value]  # T is Tensor here
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: unpack(getattr(value, field.name), packed, starts) for field in fields(value)}
        return replace(value, **parts)
    return value


def use(end: "torch.cuda.Event | None", *values: Any) -> None:
    """Make the calling thread's stream wait for copies. values: the tensors, and dataclasses of tensors, that it will use."""
    if end is None:
        return
    stream = torch.cuda.current_stream()
    stream.wait_event(end)
    for tensor in _tensors(values):
        if tensor.is_cuda:
            tensor.record_stream(stream)  # else the allocator would reuse their memory while this stream still reads it


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device: itself where it is there already, else a copy.

    To the host the copy is waited for; to a device it is only started, on the current stream. A pinned tensor may be dropped at
    once: torch gives its memory out again only when the copy has ended.
    """
    if tensor.device == device:
        return tensor
    if device.type == "cpu":
        return tensor.to(device)
    pinned = tensor if device.type != "cuda" or tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of a GPU in pinned memory of the host, after one wait for all of them."""
    copies = tuple(
        torch.empty(one.shape, dtype=one.dtype, pin_memory=one.is_cuda).copy_(one, non_blocking=True) for one in tensors
    )
    for device in {one.device for one in tensors}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # A WAIT FOR THE DEVICE: the host sends and adds these next
    return copies


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a tensor, a tuple or a dataclass."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
