"""Numbers that a process measures of itself, and their reduction over ranks. Units: bytes."""

import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from overtok_megatron.parallel.collectives import all_reduce_in_place


def peak_memory(device: torch.device) -> int:
    """Largest memory that this process held so far, bytes: of the accelerator, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone: getrusage begins with what the starting process held
        (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def over_ranks(value: float, operation: Any, device: torch.device) -> float:
    """Reduce one number over all ranks, which must all call this; device: of the run, whose backend reduces it."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    all_reduce_in_place(tensor, dist.group.WORLD, of="metrics", op=operation)
    return float(tensor)
