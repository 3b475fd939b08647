"""A run that is asked to leave saves its step and goes on with the same bits: by signals, the file STOP, and the clock."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.parallel.devices import CPU
from overtok_megatron.training.leaving import START_AGAIN, TERMINATED
from support.distributed_harness import run_ranks
from support.trained_runs import TrainedRuns, tiny_run_config
from support.workspace import losses

STEPS = 9


def config_of(folder: Path, output: Path, minutes: float | None = None) -> RunConfig:
    values = tiny_run_config(folder, "fp32").model_dump(mode="json")
    values["training"] |= {
        "output_directory": str(output),
        "micro_batch_size": 4,
        "train_iters": STEPS,
        "exit_after_minutes": minutes,
    }
    return RunConfig.model_validate(values)


def train(config: RunConfig, asks: Callable[[int, int], None] | None = None) -> tuple[int, str, bool]:
    """One rank's work: (exit code, why the run left, whether it finished). asks: called with rank and step in each step."""
    from overtok_megatron.training.trainer import Trainer

    run = Trainer(config, device=CPU, num_threads=1)
    step, count = run.engine.step, [0]

    def asked(*arguments: Any, **others: Any) -> Any:
        count[0] += 1
        if asks is not None:
            asks(run.grid.rank, count[0])
        return step(*arguments, **others)

    run.engine.step = asked  # type: ignore[method-assign]
    finished = run.run()
    return run.exit_code, "" if run.departure is None else run.departure.reason, finished


def leave_in_all_ways(folder: Path, scratch: Path) -> list[tuple[int, str, bool]]:
    """One rank's work: each run goes on from where the one before it left."""
    for name in ("whole", "leaving"):
        (scratch / name).mkdir(exist_ok=True)
    stop = scratch / "leaving" / "STOP"

    def by_signal(number: int) -> Callable[[int, int], None]:
        return lambda rank, step: os.kill(os.getpid(), number) if (rank, step) == (1, 2) else None

    def by_two(rank: int, step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM if rank == 1 else signal.SIGUSR1)

    whole, leaving = (config_of(folder, scratch / name) for name in ("whole", "leaving"))
    results = [train(whole), train(leaving, by_signal(signal.SIGUSR1))]
    stop.touch()
    results.append(train(leaving))
    assert not stop.exists()
    results += [train(config_of(folder, scratch / "leaving", minutes=1e-6)), train(leaving, by_two)]
    results.append(train(leaving, by_signal(signal.SIGTERM)))
    results.append(train(leaving))
    return results


def test_a_run_leaves_and_goes_on(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    found = run_ranks(2, leave_in_all_ways, trained_runs.folder, tmp_path)
    assert found[0] == found[1]
    stop = tmp_path / "leaving" / "STOP"
    assert found[0] == [
        (0, "", True),
        (START_AGAIN, "SIGUSR1 on rank 1", False),
        (START_AGAIN, f"the file {stop}, which is removed now", False),
        (START_AGAIN, "training.exit_after_minutes, which is 1e-06", False),
        (TERMINATED, "SIGTERM on rank 1", False),
        (TERMINATED, "SIGTERM on rank 1", False),
        (0, "", True),
    ]
    assert losses(tmp_path / "leaving") == losses(tmp_path / "whole")
    kept = sorted(path.name for path in (tmp_path / "leaving" / "checkpoints").glob("step_*"))
    assert kept == [f"step_{step:08d}" for step in (2, 3, 4, 5, 7, 9)]
