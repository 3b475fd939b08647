"""What is measured over gloo or NCCL, in a process that may be killed: a library that hangs cannot be interrupted otherwise.

A job joins a process group of its own, so that one broken link does not keep the others from being measured. Every measurement
is bounded in time on slow links: sizes grow only while a transfer takes little time. Times are seconds, rates bytes per second.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from overtok_megatron.doctor.meeting import Address
from overtok_megatron.parallel.devices import CPU, backend_of, local_device, synchronize

LARGEST = 2**26  # bytes
_SMALLEST, _GROWTH = 2**16, 8
_ENOUGH = 0.25  # seconds of a transfer after which sizes grow no more
_REPEATS = 3
_WARM_UP, _FEWEST, _MOST = 5, 10, 100  # round trips
_LATENCY_SECONDS = 0.5
_PATTERN = 251  # a prime: every byte differs from its neighbours, and from those a power of two away


@dataclass(frozen=True, kw_only=True)
class Job:
    """A measurement of `ranks` (two: their link; "all": an all-reduce over them) in a process group named `key`.

    place: of this rank among them. seconds: the library's own time limit.
    """

    kind: str
    key: str
    backend: str
    place: int
    ranks: int
    seconds: float


def serve(jobs: Connection, address: Address, local_rank: int) -> None:
    """Do jobs until the other end closes; each is answered by what was measured, or by {"failure": a line}."""
    _leave_with(os.getppid())
    torch.set_num_threads(1)
    store = None
    while True:
        try:
            job: Job = jobs.recv()
        except EOFError:
            return
        try:
            store = store or address.open(first=False, seconds=job.seconds)
            answer = run_job(job, store, local_rank)
        except Exception as error:  # libraries raise errors of any kind
            text = str(error).strip().splitlines()
            answer = {"failure": text[0] if text else type(error).__name__}
        jobs.send(answer)


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone, also where it waits in a library."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job(job: Job, store: dist.Store, local_rank: int) -> dict[str, Any]:
    """Join the job's group, measure, and leave it. Raises what the library does, RuntimeError where values come out wrong."""
    device = local_device(local_rank) if job.backend == "nccl" else CPU
    assert backend_of(device) == job.backend
    dist.init_process_group(
        job.backend,
        store=dist.PrefixStore(job.key, store),
        rank=job.place,
        world_size=job.ranks,
        timeout=timedelta(seconds=job.seconds),
    )
    try:
        return measure_link(job.place, device) if job.kind == "link" else measure_all_reduce(job.ranks, device)
    finally:
        dist.destroy_process_group()


def measure_link(place: int, device: torch.device) -> dict[str, Any]:
    """The latency of a small message (one way, the median) and the rate at which this rank sends to the other one."""
    other = 1 - place
    small = torch.zeros(1, dtype=torch.int64, device=device)

    def round_trip() -> None:
        first, second = (dist.send, dist.recv) if place == 0 else (dist.recv, dist.send)
        first(small, other)
        second(small, other)

    warm = min(_seconds(round_trip, device) for _ in range(_WARM_UP))
    turns = _announce(_bounded(_LATENCY_SECONDS / max(warm, 1e-9)), place == 0, other, device)
    latency = statistics.median(_seconds(round_trip, device) for _ in range(turns)) / 2
    pattern = _pattern(device)
    rates = [_one_way(place == sender, other, latency, pattern) for sender in (0, 1)]
    return {"latency": latency, "rate": rates[place]}


def _bounded(turns: float) -> int:
    return int(min(max(turns, _FEWEST), _MOST))


def _announce(value: int, speaks: bool, other: int, device: torch.device) -> int:
    """Both sides go on with the value of the one that speaks."""
    told = torch.tensor([value], dtype=torch.int64, device=device)
    (dist.send if speaks else dist.recv)(told, other)
    return int(told)


def _one_way(sends: bool, other: int, latency: float, pattern: torch.Tensor) -> float:
    """The rate at which a part of `pattern`, uint8 [LARGEST], is sent, timed by the sender; 0 on the other side."""
    device = pattern.device
    buffer = pattern if sends else torch.empty_like(pattern)
    small = torch.zeros(1, dtype=torch.uint8, device=device)
    size, rate = _SMALLEST, 0.0

    def transfer() -> None:
        part = buffer[:size]
        (dist.send if sends else dist.recv)(part, other)
        (dist.recv if sends else dist.send)(small, other)  # the answer: all has arrived

    while True:
        seconds = _seconds(transfer, device)
        grows = seconds < _ENOUGH and size < LARGEST
        if not _announce(int(grows), sends, other, device):
            break
        size = min(size * _GROWTH, LARGEST)
    best = min(seconds, *(_seconds(transfer, device) for _ in range(_REPEATS - 1)))
    if sends:
        rate = size / max(best - latency, 1e-9)
    elif not torch.equal(buffer[:size], pattern[:size]):
        raise RuntimeError("received other bytes than were sent")
    return rate


def _pattern(device: torch.device) -> torch.Tensor:
    """uint8 [LARGEST]: the numbers below _PATTERN, over and over."""
    return torch.arange(_PATTERN, dtype=torch.uint8, device=device).repeat(LARGEST // _PATTERN + 1)[:LARGEST]


def _sum_ones(values: torch.Tensor) -> None:
    dist.all_reduce(values.fill_(1))


def measure_all_reduce(ranks: int, device: torch.device) -> dict[str, Any]:
    """Over all ranks: the time of a small all-reduce (median), and the size, time and bus rate of the largest that is quick.

    The bus rate is 2 (n - 1) / n bytes per byte reduced: what each rank sends and receives, comparable between sizes of n.
    """
    small = torch.zeros(1, device=device)
    for _ in range(_WARM_UP):
        dist.all_reduce(small)
    latency = statistics.median(_seconds(lambda: dist.all_reduce(small), device) for _ in range(_FEWEST))
    size = _SMALLEST
    while True:
        values = torch.ones(size // 4, device=device)
        best = min(_seconds(partial(_sum_ones, values), device) for _ in range(_REPEATS))
        if not torch.equal(values, torch.full_like(values, float(ranks))):
            raise RuntimeError("the all-reduce brought a wrong sum")
        slowest = torch.tensor([best], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        best = float(slowest)
        if best >= _ENOUGH or size == LARGEST:
            break
        size = min(size * _GROWTH, LARGEST)
    return {"latency": latency, "bytes": size, "seconds": best, "rate": 2 * (ranks - 1) / ranks * size / best}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin
