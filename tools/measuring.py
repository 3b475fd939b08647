"""What benchmarks share: the quickstart's configuration, timing in turn, and a save beside training steps."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from overtok_megatron.config.loading import load_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.launching.local import free_port
from overtok_megatron.parallel.devices import synchronize
from overtok_megatron.parallel.uploading import moved

if TYPE_CHECKING:
    from overtok_megatron.training.engine import TrainingEngine
    from overtok_megatron.training.step_result import StepResult


def configuration(overrides: list[str], data: str) -> RunConfig:
    """The quickstart's over-encoded configuration with overrides; only its shape matters here."""
    path = Path(__file__).parent.parent / "configs" / "quickstart_overtok.yaml"
    return load_config(path, [f"data.train={data}", "training.output_directory=unused", *overrides]).config


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each contender, timed in turn after two warm-up rounds, so that drift of the machine affects all alike.

    device: on which they work; a call has ended when the device is idle.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, work in contenders.items():
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def steps_as_in_a_run(engine: "TrainingEngine", batches: Sequence[Tensor]) -> "Callable[[], StepResult]":
    """A function that trains the next step, on the batches in turn, each announced one step before as a run does it.

    batches: [A, b, s + 1] int64 in host memory. The engine must not be stepped in another way afterwards.
    """
    numbers = count()
    engine.announce(batches[0])

    def step() -> "StepResult":
        number = next(numbers)
        engine.announce(batches[(number + 1) % len(batches)])
        return engine.step(moved(batches[number % len(batches)], engine.device), 1e-3)

    return step


def save_beside_steps(
    start_save: Callable[[], Callable[[], Any]], step: Callable[[], float], device: torch.device
) -> tuple[float, list[float], float]:
    """Write a save on a thread while steps run: (seconds that its start took, those of each step, those of the whole).

    start_save: returns what the thread does. step: runs one step, and returns its seconds; at least one runs.
    """
    from overtok_megatron.training.saving import in_background

    started = time.perf_counter()
    thread = in_background(start_save(), device)
    stall, during = time.perf_counter() - started, [step()]
    while thread.is_alive():
        during.append(step())
    return stall, during, time.perf_counter() - started


def single_process() -> None:
    """What a launcher would put into the environment for one rank."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
