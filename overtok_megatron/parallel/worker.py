"""A thread that runs jobs one after the other, in the order in which they were given."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from overtok_megatron.parallel.devices import make_current
from overtok_megatron.parallel.spans import run_beside_training, waiting_for_thread

T = TypeVar("T")
_Jobs = SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]


class Worker:
    """Runs jobs on a thread of its own, which starts with the first job. device: its current device.

    A job that raises is the last one: every later job ends at once with the same exception. Jobs call collectives, so going
    on behind a job that failed on this rank alone would pair one job's message with another's. The thread is a daemon: a
    process that leaves does not wait for a collective in which another rank may never take part.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._name = name
        self._device = device
        self._jobs: _Jobs = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job. The future has its result, or its exception."""
        if self._thread is None:
            self._thread = threading.Thread(target=_run, args=(self._jobs, self._device), name=self._name, daemon=True)
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None)
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def result(self, future: "Future[T]") -> T:
        """The result of a job of this thread, when it has ended. Raises what the job has raised."""
        with waiting_for_thread(None if self._thread is None else self._thread.ident):
            return future.result()

    def wait(self) -> None:
        """Return when every job has ended. Raises what a job has raised."""
        if self._thread is not None:
            self.result(self.submit(lambda: None))


def _run(jobs: _Jobs, device: torch.device) -> None:
    """What the thread does until the queue brings None."""
    make_current(device)
    run_beside_training()
    torch.get_num_threads()  # torch then gives this thread's parallel loops as many OpenMP threads as those of the main thread
    failure: BaseException | None = None
    while (given := jobs.get()) is not None:
        job, future = given
        if failure is None:
            try:
                future.set_result(job())
            except BaseException as error:  # of any kind: whoever waits for the job raises it
                failure = error
        if failure is not None:
            future.set_exception(failure)
        del given, job, future  # what they hold is to be freed now and not with the next job
