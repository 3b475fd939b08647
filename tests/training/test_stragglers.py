"""A rank that is late is named, with the phase in which it loses time; where none is, nothing is said."""

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.training import straggler_report
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, layout, layout_config, own_tokens, stream
from support.trained_runs import TrainedRuns, tiny_run_config

DELAY = 0.2  # seconds per step, long beside the steps of the tiny model
STEPS, INTERVAL = 12, 6


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def slower(*arguments: Any, **others: Any) -> Any:
        time.sleep(DELAY)
        return function(*arguments, **others)

    return slower


def slow_reading(run: Any) -> None:
    """Each reading takes longer than a step without it: tokens are read ahead, and a shorter delay would make nobody late."""
    step, read, last = run.engine.step, run.feed._batches.read, [0.0]

    def timed(*arguments: Any, **others: Any) -> Any:
        begin = time.monotonic()
        result = step(*arguments, **others)
        last.append(time.monotonic() - begin)
        return result

    def slower(*arguments: Any) -> Any:
        time.sleep(min(2.0, max(DELAY, 2 * last[-1])))
        return read(*arguments)

    run.engine.step, run.feed._batches.read = timed, slower


def slow_saving(run: Any) -> None:
    """Each save takes three times as long: the first rank has more to do in saves than others have."""
    save = run.saver.save

    def slower(*arguments: Any) -> None:
        begin = time.monotonic()
        save(*arguments)
        time.sleep(max(DELAY, 2 * (time.monotonic() - begin)))

    run.saver.save = slower


def plant(run: Any, where: str) -> None:
    """Slow one place of a run down."""
    engine = run.engine
    if where == "data":
        slow_reading(run)
    elif where == "forward and backward":
        engine.model.register_forward_pre_hook(lambda *_: time.sleep(DELAY))
    elif where == "row exchange":
        engine.tables.exchange.start_fetch = slow(engine.tables.exchange.start_fetch)
    elif where == "update of rows":
        engine.tables.optimizer.update = slow(engine.tables.optimizer.update)
    elif where == "update of weights":
        engine.optimizer.register_step_pre_hook(lambda *_: time.sleep(DELAY))
    elif where == "save":
        slow_saving(run)
    else:
        assert where == "", where


@dataclass(frozen=True)
class Case:
    """A run. late: where which ranks are slow. changes: of its configuration, by section."""

    late: dict[int, str]
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)


def a_run(folder: Path, scratch: Path, case: Case) -> list[str]:
    """One rank's work: a run, and what it says of stragglers."""
    from overtok_megatron.training.trainer import Trainer

    values = tiny_run_config(folder, "bf16").model_dump(mode="json")
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    values["training"] |= {
        "output_directory": str(scratch), "global_batch_size": 12, "train_iters": STEPS, "validation_interval": None,
        "micro_batch_size": 12 // world, "num_threads": 1, "straggler_report_interval": INTERVAL, "straggler_threshold": 0.25,
    }  # fmt: skip
    values["logging"] |= {"interval": 4, "tensorboard": False}
    for section, changed in case.changes.items():
        values[section] |= changed
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    straggler_report.log.addHandler(kept := Kept())
    scratch.mkdir(exist_ok=True)
    run = Trainer(RunConfig.model_validate(values), device=CPU, num_threads=1)
    plant(run, case.late.get(run.grid.rank, ""))
    assert run.run()
    straggler_report.log.removeHandler(kept)
    return said


def all_runs(folder: Path, scratch: Path, cases: list[Case]) -> list[list[str]]:
    return [a_run(folder, scratch / str(number), case) for number, case in enumerate(cases)]


def reports(run: Path) -> list[dict[str, float]]:
    return [record for record in RunFolder(run).read_metrics() if "stragglers/late_rank" in record]


def check(said: list[str], run: Path, late: int, where: str) -> None:
    """A run in which one rank was slow in one place has said so, and reported it each time."""
    assert 1 <= len(said) <= 2, said  # once more where a busy machine made it later
    for line in said:
        assert line.startswith(f"rank {late} ({socket.gethostname()}) is late by 0."), said
        assert f"above all in phase {where!r}" in line
        assert len(line) <= 300
    found = reports(run)
    assert [record["step"] for record in found] == [6, 12]
    for record in found:
        assert record["stragglers/late_rank"] == late
        assert DELAY / 4 < record["stragglers/late_seconds"] < 10 * DELAY
        assert record["stragglers/busy_seconds_max"] > DELAY / 4
        assert record["stragglers/waited_seconds_median"] > DELAY / 8


PLAIN = [
    Case({1: "data"}),
    Case({0: "forward and backward"}),
    Case({1: "row exchange"}),
    Case({1: "update of rows"}),
    Case({1: "update of weights"}, {"parallel": {"zero_stage": 2}}),
    Case({1: "forward and backward"}, {"parallel": {"zero_stage": 3}, "over_encoding": {"enabled": False}}),
    Case({1: "save"}, {"checkpoint": {"interval": 2, "keep_last": 1}}),
    # the other rank waits for a thread that waits in a broadcast
    Case({0: "data"}, {"parallel": {"tensor_parallel_size": 2}, "training": {"micro_batch_size": 12}}),
]


@pytest.mark.parametrize("cases", [PLAIN[:4], pytest.param(PLAIN[4:], marks=pytest.mark.slow)], ids=["some", "others"])
def test_a_slow_rank_is_named_with_its_phase(trained_runs: TrainedRuns, tmp_path: Path, cases: list[Case]) -> None:
    first, second = run_ranks(2, all_runs, trained_runs.folder, tmp_path, cases, timeout=230)
    assert not any(second), "the first rank speaks for all"
    for number, (case, said) in enumerate(zip(cases, first, strict=True)):
        ((late, where),) = case.late.items()
        check(said, tmp_path / str(number), late, where)


def calls_of_steps() -> tuple[list[int], list[Any]]:
    """One rank's work: how many all-reduces three steps make, of which the last reports, and the numbers of that report."""
    config = layout_config(layout("z1"))
    engine, counts, reduce = TrainingEngine(config, start_processes(config, CPU), CPU, EOD), [0], dist.all_reduce

    def counted(*arguments: Any, **others: Any) -> Any:
        counts[-1] += 1
        return reduce(*arguments, **others)

    dist.all_reduce = counted
    for step, reports in enumerate((False, False, False, True)):
        counts.append(0)
        engine.times.begin_step(step)
        result = engine.step(own_tokens(engine, stream()[step]), 3e-3, report_times=reports)
        assert bool(result.times) == reports
    return counts[2:], [list(numbers) for numbers in result.times]


def test_a_report_takes_no_message_of_its_own() -> None:
    (counts, times), (others, same) = run_ranks(2, calls_of_steps)
    assert counts == others
    assert counts[0] == counts[1] == counts[2] > 0
    assert times == same
    assert [numbers[0] for numbers in times] == [3, 3]  # steps
    assert times[0] != times[1]


@pytest.mark.ci
def test_one_of_three_ranks_is_named(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    cases = [Case({2: "update of rows"}), Case({1: "forward and backward"})]
    said, *_ = run_ranks(3, all_runs, trained_runs.folder, tmp_path, cases, timeout=230)
    check(said[0], tmp_path / "0", 2, "update of rows")
    check(said[1], tmp_path / "1", 1, "forward and backward")
    assert "than the median of 2 ranks with the same work" in said[0][0]


def test_where_no_rank_is_slow_nothing_is_said(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    """Ranks of one machine that is busy differ by chance, hence a threshold of a whole step; reports come all the same."""
    quiet = {"training": {"straggler_threshold": 1.0}}
    off = {"training": {"straggler_report_interval": None}}
    cases = [Case({}, quiet), Case({0: "update of rows", 1: "update of rows"}, quiet), Case({1: "data"}, off)]
    found = run_ranks(2, all_runs, trained_runs.folder, tmp_path, cases, timeout=230)
    assert found == [[[], [], []]] * 2
    for run in ("0", "1"):
        assert [record["step"] for record in reports(tmp_path / run)] == [6, 12]
        for record in reports(tmp_path / run):
            assert record["stragglers/late_rank"] == -1
            assert record["stragglers/late_seconds"] == 0
    assert not reports(tmp_path / "2")


@pytest.mark.ci
def test_a_stage_of_one_rank_is_compared_with_the_others(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    cases = [Case({1: "update of weights"}, {"parallel": {"pipeline_parallel_size": 2}})]
    (said,), _ = run_ranks(2, all_runs, trained_runs.folder, tmp_path, cases, timeout=230)
    line = said[0]
    assert line.startswith(f"rank 1 ({socket.gethostname()}), the only one of stage 2 of 2, is late by 0.")
    assert "above all in phase 'update of weights'" in line
    assert line.endswith("; a stage with more work is late, too: see parallel.pipeline_partition")
    assert len(line) <= 300


@pytest.mark.slow
def test_in_a_pipeline_ranks_of_one_stage_are_compared(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    """The last stage always waits less than the first, and is not late for that."""
    cases = [Case({3: "forward and backward"}, {"parallel": {"pipeline_parallel_size": 2}}),
             Case({}, {"parallel": {"pipeline_parallel_size": 2}, "training": {"straggler_threshold": 1.0}})]  # fmt: skip
    said, *_ = run_ranks(4, all_runs, trained_runs.folder, tmp_path, cases, timeout=230)
    check(said[0], tmp_path / "0", 3, "forward and backward")
    assert "than the median of 1 rank with the same work" in said[0][0]
    assert not said[1]
