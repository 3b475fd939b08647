"""Reads of what a device has computed, made while the device still does later work. On the CPU nothing is ever late.

What the host reads of a step, its loss and norms, is known before the update of the parameters. On the stream that computes, a
read would come after that update, and the host would stand still meanwhile, with nothing of the next step given to the device.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

_FIRST = -1  # a stream's priority: its small kernels begin between the blocks of the update's large ones


class EarlyReads:
    """A stream beside the one that computes, which waits for what came before a mark, and for nothing after it.

    Order of calls in a step: `begin_step`; `mark`, where all that is to be read has been enqueued; later work; `stream`.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=_FIRST) if device.type == "cuda" else None
        self._mark: torch.cuda.Event | None = None

    def begin_step(self) -> None:
        """Forget the mark of the last step."""
        self._mark = None

    def mark(self) -> None:
        """Mark this moment in the work of the calling thread's current stream; only the first call of a step counts."""
        if self._stream is not None and self._mark is None:
            self._mark = torch.cuda.current_stream(self._stream.device).record_event()

    def stream(self) -> AbstractContextManager[object]:
        """In this context operators wait only for what came before the mark; without a mark the current stream stays.

        In it, use tensors that were made before the mark and are still referenced where the context ends, and read the result
        to the host before the context ends, and use no tensor afterwards that was made in it. The host has then waited for all
        work of this stream, so that neither stream's memory is given out anew while the other one uses it.
        """
        if self._stream is None or self._mark is None:
            return nullcontext()
        self._stream.wait_event(self._mark)
        return torch.cuda.stream(self._stream)
