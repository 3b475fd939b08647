"""A rank that is late is named, with the phase in which it loses time; where none is, nothing is said."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.training import straggler_report
from support.distributed_harness import run_ranks
from support.layouts import CPU
from support.trained_runs import TrainedRuns, tiny_run_config

DELAY, STEPS, INTERVAL = 0.05, 24, 8
LATE = 1  # the rank that is slow, where a test does not say otherwise


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def slower(*arguments: Any, **others: Any) -> Any:
        time.sleep(DELAY)
        return function(*arguments, **others)

    return slower


def plant(run: Any, where: str) -> None:
    """Slow one place of a run down."""
    engine = run.engine
    if where == "data":
        run.feed._batches.read = slow(run.feed._batches.read)
    elif where == "forward and backward":
        engine.model.register_forward_pre_hook(lambda *_: time.sleep(DELAY))
    elif where == "row exchange":
        engine.tables.exchange.start_fetch = slow(engine.tables.exchange.start_fetch)
    elif where == "update of rows":
        engine.tables.optimizer.update = slow(engine.tables.optimizer.update)
    elif where == "update of weights":
        engine.optimizer.register_step_pre_hook(lambda *_: time.sleep(DELAY))
    elif where == "save":
        run.saver.save = slow(run.saver.save)
    else:
        assert where == "", where


def a_run(folder: Path, scratch: Path, changes: dict[str, dict[str, Any]], late: dict[int, str]) -> list[str]:
    """One rank's work: a run, with what is said of stragglers. late: where ranks are slow, by rank."""
    from overtok_megatron.training.trainer import Trainer

    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    straggler_report.log.addHandler(Kept())
    values = tiny_run_config(folder, "bf16").model_dump(mode="json")
    values["training"] |= {
        "output_directory": str(scratch), "micro_batch_size": 2, "train_iters": STEPS, "validation_interval": None,
        "global_batch_size": 12, "straggler_report_interval": INTERVAL, "straggler_threshold": 0.25,
    }  # fmt: skip
    values["logging"]["interval"] = 7
    for section, changed in changes.items():
        values[section] |= changed
    run = Trainer(RunConfig.model_validate(values), device=CPU, num_threads=1)
    plant(run, late.get(dist.get_rank(), ""))
    assert run.run()
    return said


def reports(scratch: Path) -> list[dict[str, float]]:
    return [record for record in RunFolder(scratch).read_metrics() if "stragglers/late_rank" in record]


@pytest.mark.parametrize(
    ("world", "where", "changes"),
    [
        (2, "data", {}),
        (2, "forward and backward", {}),
        (2, "row exchange", {}),
        (3, "update of rows", {}),
        (2, "update of weights", {"parallel": {"zero_stage": 1}}),
        (2, "data", {"parallel": {"zero_stage": 3}, "training": {"precision": "fp32"}}),
        (2, "forward and backward", {"over_encoding": {"enabled": False}}),
        (2, "save", {"checkpoint": {"interval": 1}}),
    ],
)
def test_a_slow_rank_is_named_with_its_phase(
    trained_runs: TrainedRuns, tmp_path: Path, world: int, where: str, changes: dict[str, Any]
) -> None:
    said, *others = run_ranks(world, a_run, trained_runs.folder, tmp_path, changes, {LATE: where})
    assert not any(others), "the first rank speaks for all"
    (line, *more) = said
    assert line.startswith(f"rank {LATE} ("), said
    assert f"above all in phase {where!r}" in line
    assert len(line) <= 300
    assert not more, "what was said is not said again"
    found = reports(tmp_path)
    assert [record["step"] for record in found] == [8, 16, 24]
    for record in found:
        assert record["stragglers/late_rank"] == LATE
        assert DELAY / 2 < record["stragglers/late_seconds"] < 4 * DELAY
        assert record["stragglers/busy_seconds_max"] > DELAY / 2 + record["stragglers/busy_seconds_median"] / world
        assert record["stragglers/waited_seconds_median"] > 0
