"""Spans around collectives: names for profiler traces and for reports on hangs, and how long each thread has waited in them.

What is kept here concerns the process, like a profiler's trace, and nothing that computes reads it.

On the CPU a thread that is in a span of a collective waits for other ranks, or for its own messages. On a GPU a collective is
only enqueued in its span, and the stream waits later: what was enqueued between both ends of a span is what an observer can
time on the device (training/phase_times.py).
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch.distributed as dist
from torch.profiler import record_function


class Observer(Protocol):
    """Is told of spans, by the thread that is in them; of those within another one it is not told."""

    def begins(self) -> None: ...

    def ends(self) -> None: ...


class _Thread:
    """What one thread does: the spans that it is in, the outermost first, and its seconds in spans that have ended.

    Another thread may read it at any time, so that what belongs together is replaced in one assignment.
    """

    def __init__(self) -> None:
        self.open: tuple[tuple[str, float], ...] = ()
        self.state: tuple[float, float | None] = (0.0, None)  # seconds that have ended, begin of the outermost span
        self.for_threads = 0.0  # of these seconds, those in which it waited for other threads that were in spans

    def begin(self, name: str) -> None:
        now = time.monotonic()
        if not self.open:
            self.state = self.state[0], now
        self.open = (*self.open, (name, now))

    def end(self) -> None:
        self.open = self.open[:-1]
        ended, begin = self.state
        if not self.open and begin is not None:
            self.state = ended + time.monotonic() - begin, None

    def waited(self, now: float) -> float:
        ended, begin = self.state
        return ended if begin is None else ended + now - begin

    def add(self, seconds: float) -> None:
        """Count further seconds as waited, outside of spans."""
        ended, begin = self.state
        if begin is None:
            self.state = ended + seconds, None
            self.for_threads += seconds


_THREADS: dict[int, _Thread] = {}
_OBSERVERS: list[Observer] = []  # at most one
_BESIDE_TRAINING: set[int] = set()  # threads that run beside the training, whose spans are not observed


def _own() -> _Thread:
    thread = _THREADS.get(threading.get_ident())
    if thread is None:
        thread = _THREADS[threading.get_ident()] = _Thread()
    return thread


class _Span(record_function):
    """A span in a profiler's trace, during which `under_way` names it."""

    def __enter__(self) -> "_Span":
        self._observer = _begin(self.name)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _end(self._observer)


def _begin(name: str) -> Observer | None:
    """Enter a span; returns whom to tell of its end."""
    thread = _own()
    observer = None
    if _OBSERVERS and not thread.open and threading.get_ident() not in _BESIDE_TRAINING:
        (observer,) = _OBSERVERS
        observer.begins()
    thread.begin(name)
    return observer


def _end(observer: Observer | None) -> None:
    _own().end()
    if observer is not None:
        observer.ends()


def profiler_span(operation: str, group: dist.ProcessGroup) -> record_function:
    """A span in a profiler's trace, named by group and operation. Every collective of this package runs within one.

    A collective that is only launched within it is waited for in a span of `wait_for`.
    """
    return _Span(f"{group.group_desc}: {operation}")


def wait_for(work: dist.Work, name: str, *arguments: Any) -> Any:
    """Wait for a collective that was launched before; on a GPU only the current stream waits. name: for reports on hangs.

    arguments: of `work.wait`, whose result is returned.
    """
    observer = _begin(name)
    try:
        return work.wait(*arguments)
    finally:
        _end(observer)


@contextmanager
def waiting_for_thread(ident: int | None) -> Iterator[None]:
    """While this thread waits for the work of another one: it waits for other ranks for as long as that one does.

    ident: of the other thread; None = it is not known, and nothing is counted.
    """
    other = None if ident is None else _THREADS.get(ident)
    before = 0.0 if other is None else other.waited(time.monotonic())
    try:
        yield
    finally:
        other = None if ident is None else _THREADS.get(ident)  # perhaps its first span began meanwhile
        if other is not None:
            _own().add(other.waited(time.monotonic()) - before)


def seconds_waited(now: float) -> float:
    """How long this thread has been in spans by `now` of time.monotonic(), or has waited for threads that were."""
    return _own().waited(now)


def seconds_waited_for_threads() -> float:
    """How long this thread has waited for other threads that were in spans, which is part of `seconds_waited`."""
    return _own().for_threads


def under_way() -> list[tuple[str, float]]:
    """The collectives that the threads of this process are in: the innermost one's name, and time.monotonic() of its begin."""
    now_open = [thread.open for thread in list(_THREADS.values())]
    return [spans[-1] for spans in now_open if spans]


def run_beside_training() -> None:
    """Say that the spans of the calling thread are not of the training that an observer times."""
    _BESIDE_TRAINING.add(threading.get_ident())


def observe(observer: Observer | None) -> None:
    """Tell an observer of all spans of threads that train, the engine's backward threads included; None = nobody any more."""
    _OBSERVERS[:] = [] if observer is None else [observer]
