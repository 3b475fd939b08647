"""The processes that run the checks: one per rank, supervised from outside.

A kernel that never returns cannot be interrupted, and a CUDA error spoils its whole process. So checks run in processes of
their own: after a check that hangs, kills its process or leaves the device or the process group in doubt, new ones begin.
They are spawned: each of them imports the starting script again.
"""

import gc
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpu_checks.installation import device_name
from gpu_checks.registry import Check, Context, Outcome, Result, Status
from overtok_megatron.environment import VISIBLE, rank_environment, restore_visible_devices
from overtok_megatron.launching.local import free_port
from overtok_megatron.parallel.devices import local_device

_START_SECONDS = 180.0  # until a new process has imported everything and opened its device
_GRACE_SECONDS = 10.0  # for the other ranks, once one has failed: they may be in a collective that never ends
_LAST_WORDS = 2000  # characters of a dead process's output that are kept


@dataclass(frozen=True)
class _Silent:
    """Takes the place of a rank's answer where there is none. why: the exception in one line, or how the process ended;
    words: the traceback, or the end of its output."""

    why: str
    words: str
    alive: bool = False


def first_line(error: BaseException) -> str:
    """An exception as one line of at most 200 characters."""
    text = str(error).strip().split("\n", 1)[0] or type(error).__name__
    return text[:197] + "..." if len(text) > 200 else text


def _failed(check: Check, begin: float, answer: _Silent, rank: int | None) -> Outcome:
    of_rank = "" if rank is None else f"rank {rank}: "
    return Outcome(check.name, "failed", of_rank + answer.why, seconds=_since(begin), traceback=answer.words)


def _since(begin: float) -> float:
    return time.perf_counter() - begin


def _run(function: Callable[[Context], Result], context: Context) -> Result | _Silent:
    try:
        return function(context)
    except Exception as error:  # whatever a check stumbles over is a line of the table, not the end of the tool
        return _Silent(f"{type(error).__name__}: {first_line(error)}", traceback.format_exc(), alive=True)
    finally:
        if torch.are_deterministic_algorithms_enabled():  # to ask is quick; to set imports a compiler
            torch.use_deterministic_algorithms(False)


def _work(pipe: Connection, rank: int, ranks: int, folder: Path, quick: bool, log: Path) -> None:
    """A rank's process: runs the functions that come through the pipe until it is closed."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    tqdm.set_lock(threading.RLock())  # its own default is a semaphore of the system, which outlives a killed process
    context = Context(local_device(rank), folder, quick, ranks, rank)
    pipe.send(device_name(context.cuda))
    while True:
        try:
            function = pipe.recv()
        except EOFError:
            os._exit(0)  # taking gloo's threads apart at interpreter exit aborts the process now and then
        pipe.send(_run(function, context))
        gc.collect()
        gc.freeze()  # DeepSpeed collects garbage many times per engine: not among all the modules that are loaded by now


class Workers:
    """`ranks` processes that run check after check; without `cuda` they see no CUDA device."""

    def __init__(self, ranks: int, folder: Path, *, quick: bool, cuda: bool, name: str = "worker") -> None:
        self._ranks, self._folder, self._quick, self._cuda, self._name = ranks, folder, quick, cuda, name
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._started = 0
        self.device = ""  # its name, once the processes have started

    def run(self, check: Check) -> Outcome:
        """Run one check on all ranks and wait for it, at most its seconds."""
        if check.fresh and self._cuda:
            self.close()
        begin = time.perf_counter()
        dead = self.start()
        if dead:
            self.close()
            return _failed(check, begin, dead[0], None)
        begin = time.perf_counter()
        for pipe in self._pipes:
            with suppress(ConnectionError):  # of a process that has died since: its answer is that it did
                pipe.send(check.function)
        answers = self._collect(check.seconds)
        for rank, answer in answers.items():  # in the order in which they came: the cause before those that wait for it
            if not isinstance(answer, Result):
                if self._ranks > 1 or self._cuda or not answer.alive:
                    self.close()  # its device, or the group, may be in any state
                return _failed(check, begin, answer, rank if self._ranks > 1 else None)
            if answer.passed is False:  # a wrong figure leaves the processes as they were
                return Outcome(check.name, "failed", answer.figure, answer.limit, _since(begin), numbers=answer.numbers)
        late = [rank for rank in range(self._ranks) if rank not in answers]
        if late:
            answer = self._silent(late[0], f"no result within its {check.seconds:g} s")
            self.close()
            return _failed(check, begin, answer, late[0] if self._ranks > 1 else None)
        first = answers[0]
        status: Status = "measured" if first.passed is None else "passed"
        return Outcome(check.name, status, first.figure, first.limit, _since(begin), numbers=first.numbers)

    def start(self) -> list[_Silent]:
        """Begin new processes where there are none; what the ranks that failed said, else an empty list."""
        if self._processes:
            return []
        self._started += 1
        # deterministic: its cuBLAS setting is read when a process first multiplies, and is the default of recent cards
        environment = rank_environment(os.environ, self._ranks + 1, deterministic=True, cuda=self._cuda)
        restore_visible_devices(environment)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self._ranks)}
        environment |= {"LOCAL_WORLD_SIZE": str(self._ranks), "DS_ACCELERATOR": "cuda" if self._cuda else "cpu"}
        environment |= {} if self._cuda else {VISIBLE: ""}
        spawn = multiprocessing.get_context("spawn")
        before = dict(os.environ)
        for rank in range(self._ranks):
            ours, theirs = spawn.Pipe()
            arguments = (theirs, rank, self._ranks, self._folder, self._quick, self._log(rank))
            process = spawn.Process(target=_work, args=arguments, daemon=True)
            os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            try:
                process.start()
            finally:
                os.environ.clear()
                os.environ.update(before)
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        answers = self._collect(_START_SECONDS)
        late = f"its process did not start within {_START_SECONDS:.0f} s"
        silent = [self._silent(rank, late) for rank in range(self._ranks) if rank not in answers]
        self.device = next((name for name in answers.values() if isinstance(name, str)), self.device)
        return [answer for answer in answers.values() if not isinstance(answer, str)] + silent

    def begin(self, function: Callable[[Context], None]) -> None:
        """Start a function on all ranks without waiting for it."""
        if not self.start():
            for pipe in self._pipes:
                pipe.send(function)

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _log(self, rank: int) -> Path:
        return self._folder / f"{self._name}-{self._started}-{rank}.log"

    def _collect(self, seconds: float) -> dict[int, Any]:
        """Rank -> its answer, in the order in which they came; those that are not there in time are left out."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < self._ranks and (left := deadline - time.monotonic()) > 0:
            waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            for pipe in wait(list(waiting), left):
                rank = waiting[pipe]
                try:
                    answers[rank] = self._pipes[rank].recv()
                except (EOFError, ConnectionError):
                    self._processes[rank].join(5)
                    answers[rank] = self._silent(rank, f"its process died ({self._processes[rank].exitcode})")
                if isinstance(answers[rank], _Silent):
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return answers

    def _silent(self, rank: int, why: str) -> _Silent:
        log = self._log(rank)
        words = log.read_text(encoding="utf-8", errors="replace")[-_LAST_WORDS:] if log.exists() else ""
        return _Silent(why, words)
