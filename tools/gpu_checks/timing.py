"""How many seconds work on a device takes, and how fast a copy of its memory is."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

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
