"""How long work on a device takes: until it is done, on the device alone, and on the host that asks for it; and a copy's rate.

A call of a small pass from Python takes the host longer than the device, so the time until it is done says nothing of kernels.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from gpu_checks.registry import Context
from overtok_megatron.parallel.devices import synchronize


def seconds_of(work: Callable[[], object], device: torch.device, *, rounds: int = 7, warm: int = 2) -> float:
    """Median seconds of one call, the device's work included, after `warm` calls that are not counted."""
    times = []
    for turn in range(warm + rounds):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        if turn >= warm:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


@dataclass(frozen=True)
class Span:
    """A kernel, a copy or a fill that ran on the device. start, stop: seconds since some moment."""

    name: str
    start: float
    stop: float


def device_spans(events: Iterable[FunctionEvent]) -> list[Span]:
    """What ran on a CUDA device, of a profiler's events: without ranges that code has named, which cover gaps as well."""
    return [
        Span(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def busy_seconds(spans: list[Span]) -> float:
    """How long at least one span was running."""
    busy, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        busy += max(0.0, span.stop - max(span.start, reached))
        reached = max(reached, span.stop)
    return busy


def device_seconds_of(work: Callable[[], object], device: torch.device, *, calls: int = 5, warm: int = 2) -> float:
    """Seconds per call during which the device works: the durations of all kernels; on the CPU the same as `seconds_of`.

    Needs no quiet host: gaps between kernels, in which the device waits for the host, are not counted. It is nan where the
    profiler sees nothing of the device, because CUPTI is missing or in use: a check's other findings are worth having.
    """
    if device.type != "cuda":
        return seconds_of(work, device, rounds=calls, warm=warm)
    for _ in range(warm):
        work()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            work()
        synchronize(device)
    spans = device_spans(profiler.events() or [])
    return sum(span.stop - span.start for span in spans) / calls if spans else math.nan


def host_seconds_of(work: Callable[[], object], device: torch.device, *, calls: int = 10, rounds: int = 3) -> float:
    """Seconds that the host takes to enqueue one call, without a wait for its result: the median of `rounds` rows of calls.

    calls: so few that their kernels fit into the queue of a CUDA stream, about a thousand; the host waits where it is full. On
    the CPU the host does the work itself.
    """
    times = []
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - begin) / calls)
    synchronize(device)
    return statistics.median(times)


def copy_rate(context: Context) -> float:
    """Bytes/s that a large copy reads and writes on the device: the limit of everything that only moves memory."""
    size = 2**30 if context.cuda else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), context.device)


def free_memory(context: Context) -> int:
    """Free bytes of the device, after memory that earlier checks left behind has been returned."""
    assert context.cuda
    gc.collect()
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info(context.device)[0]
    return free
