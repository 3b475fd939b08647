"""A stream of a device for copies to host memory, beside the stream that computes. On the CPU copies are made at once.

The methods only enqueue copies. A copy is complete when a mark that was set after it has come. No method makes the calling
thread wait for the device, except `synchronize` of a mark.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A moment in the work of a stream; torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether the moment has come."""

    def synchronize(self) -> None:
        """Make the calling thread wait for it."""

    def wait(self) -> None:
        """Make the calling thread's current stream wait for it. The thread itself goes on."""


class _Past:
    """The mark of a device that does everything at once: its moment has always come."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self) -> None:
        pass


def stream_of_thread(device: torch.device) -> AbstractContextManager[object]:
    """In this context, a new stream of the device is the calling thread's current one; nothing where the device has none.

    Without it, what a second thread launches goes to the default stream, in which the training thread computes.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


class CopyStream:
    """Copies from the memory of a device to host memory, made in the order in which any thread asks for them.

    Where the device is the CPU, each copy is made by the thread that asks for it, before the call returns.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_host = device.type == "cpu"
        self._stream = None if self.is_host else torch.cuda.Stream(device)

    def follow_compute(self) -> None:
        """Make coming copies wait for all work that the calling thread's current stream was given before."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def mark(self) -> Mark:
        """The moment at which all copies that were asked for before have been made."""
        if self._stream is None:
            return _Past()
        # blocking: a thread that waits for it sleeps, where otherwise it would keep a core busy
        return self._stream.record_event(torch.cuda.Event(blocking=True))

    def buffer(self, like: Tensor, count: int | None = None) -> Tensor:
        """Host memory, pinned beside a GPU, for a tensor such as `like`; with `count` entries in its first dimension."""
        shape = like.shape if count is None else (count, *like.shape[1:])
        return torch.empty(shape, dtype=like.dtype, pin_memory=not self.is_host)

    def read(self, target: Tensor, source: Tensor) -> None:
        """Copy a tensor of the device into `target`, a buffer of its shape.

        The caller keeps `source` until the copy has been made.
        """
        with self._current():
            target.copy_(source, non_blocking=True)

    def read_entries(self, target: Tensor, source: Tensor, index: Tensor) -> None:
        """Copy source[index] into `target`, a buffer; index int64 [r] on the device. As much memory of the device is taken."""
        with self._current():
            target.copy_(source.index_select(0, index), non_blocking=True)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy in a buffer of its own. The caller need not keep `tensor`."""
        target = self.buffer(tensor)
        self.read(target, tensor)
        self._keep(tensor)
        return target

    def to_host(self, tensor: Tensor) -> Tensor:
        """The tensor itself where it is in host memory, else its copy."""
        return tensor if self.is_host else self.copy(tensor)

    def _current(self) -> AbstractContextManager[object]:
        """In this context, the copy stream is the calling thread's current one."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _keep(self, tensor: Tensor) -> None:
        """Keep the tensor's memory from being used anew before the copies that were asked for have been made."""
        if self._stream is not None:
            tensor.record_stream(self._stream)
