"""A checkpoint loaded into a fresh engine goes on with the same bits, for every ZeRO stage, split and row optimizer."""

import json
import os
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from overtok_megatron.checkpoint.store import CheckpointStore, Digest, file_digest
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import CheckpointError, DataError
from overtok_megatron.training import resuming, saving, trainer
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.resuming import load_checkpoint
from overtok_megatron.training.saving import Saver, leave_note
from overtok_megatron.training.schedules import Schedule
from support.distributed_harness import run_ranks
from support.formula_cases import EOD, SEQ, STEPS, Case, case_config, stream
from support.trained_runs import TrainedRuns, tiny_run_config

CPU = torch.device("cpu")

ADDED = [{"orders": [4], "num_slices": 2, "table_rows": 41}]
CASES = [
    Case("zero 0, float32", parallel={"zero_stage": 0}),
    Case("zero 1", {"optimizer": "rowwise_adagrad"}, parallel={"zero_stage": 1}, training={"precision": "bf16"}),
    Case(
        "zero 2, added tables",
        {"state_dtype": "bfloat16", "row_dtype": "int8", "added": ADDED},
        parallel={"zero_stage": 2},
        training={"precision": "bf16"},
    ),
    Case("zero 3", {"optimizer": "sgd"}, parallel={"zero_stage": 3}, training={"precision": "bf16"}),
    Case("zero 3, float32, tied", model={"tie_word_embeddings": True}, parallel={"zero_stage": 3}),
    Case("zero 0", parallel={"zero_stage": 0}, training={"precision": "bf16", "micro_batch_size": 4}),
    Case("tensor parallel", parallel={"tensor_parallel_size": 2, "zero_stage": 1}, training={"precision": "bf16"}),
    Case(
        "pipeline, frozen base",
        {"frozen": True, "added": ADDED},
        parallel={"pipeline_parallel_size": 2, "zero_stage": 1},
        training={"precision": "bf16"},
    ),
    Case("pipeline, tied", model={"tie_word_embeddings": True}, parallel={"pipeline_parallel_size": 2}),
    Case("context", parallel={"context_parallel_size": 2, "zero_stage": 2}, training={"precision": "bf16"}),
    Case("no tables here", {"ngram_order": 2, "num_slices": 1, "table_rows": 1}, parallel={"zero_stage": 1}),
]


def run(engine: TrainingEngine, steps: range) -> list[float]:
    """Losses of some steps of the stream, on this rank's part of it."""
    tokens = stream(engine.config.model.vocab_size)
    ranks, rank = engine.grid.shape.data, engine.grid.data_rank
    parts = [tokens[step].view(engine.num_micro_batches, ranks, -1, SEQ + 1)[:, rank] for step in steps]
    return [engine.step(part, 3e-3).loss for part in parts]


@dataclass(frozen=True)
class Resumed:
    """Losses of an unbroken run, of one that went through a checkpoint, whether all weights agree in the end, and the
    names of the files outside the tables' folder that this rank hashed."""

    unbroken: list[float]
    resumed: list[float]
    same: bool
    hashed: list[str]


def resume_case(case: Case, folder: Path) -> Resumed:
    config = case_config(case)
    hashed: list[str] = []

    def digest(path: Path) -> Digest:
        hashed.append(path.name)
        return file_digest(path)

    saving.file_digest = digest  # type: ignore[assignment]  # in this rank's own process
    grid = start_processes(config, CPU)
    whole, store = TrainingEngine(config, grid, CPU, EOD), CheckpointStore(folder)
    losses = run(whole, range(2))
    saver = Saver(whole, store, eod_id=EOD, tokenizer_fingerprint="none")
    saver.save(2, 0)
    losses += run(whole, range(2, STEPS))  # while the tables are being written
    saver.finish()
    fresh = TrainingEngine(config, grid, CPU, EOD)
    path = store.latest()
    assert path is not None
    assert load_checkpoint(fresh, path).step == 2
    resumed = losses[:2] + run(fresh, range(2, STEPS))
    assert whole.tables is not None
    assert fresh.tables is not None
    same = torch.equal(whole.tables.store.rows.weight, fresh.tables.store.rows.weight)
    dense = fresh.dense_weights()
    same &= all(torch.equal(weight, dense[name]) for name, weight in whole.dense_weights().items())
    return Resumed(losses, resumed, same, hashed)


def resume_cases(cases: list[Case], folder: Path) -> list[Resumed]:
    """One rank's work."""
    return [resume_case(case, folder / str(index)) for index, case in enumerate(cases)]


def test_resumed_engines_go_on_bit_for_bit(tmp_path: Path) -> None:
    ranks = run_ranks(2, resume_cases, CASES, tmp_path, timeout=200)
    for rank in ranks:
        for case, found in zip(CASES, rank, strict=True):
            assert found.resumed == found.unbroken, case.name
            assert found.same, case.name
    # each rank hashes what it wrote: one alone would keep the others waiting, with the files of a thousand
    first, second = ranks[0][1], ranks[1][1]
    assert CASES[1].name == "zero 1"
    assert not set(first.hashed) & set(second.hashed)
    assert [name for name in second.hashed if "zero_pp_rank_1" in name]
    assert [name for name in first.hashed if "zero_pp_rank_0" in name]


def test_notes_may_be_taken_away_the_moment_they_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, read = os.replace, []

    def replace_and_publish(source: Path, target: Path) -> None:
        """The first rank is as fast as can be."""
        replace(source, target)
        read.append((target.name, json.loads(target.read_text())))
        shutil.rmtree(target.parent)

    monkeypatch.setattr(os, "replace", replace_and_publish)
    leave_note(tmp_path, 1, {"tables/rows": (64, "5e")})
    assert read == [("1.json", {"tables/rows": [64, "5e"]})]
    assert list(tmp_path.iterdir()) == []


def noted_ranks(folder: Path) -> tuple[list[int], list[str]]:
    """One rank's work: whose notes were left in a save by the function that the test above looks at, and failing loads."""
    noted, leave = [], saving.leave_note
    saving.leave_note = lambda folder, rank, digests: (noted.append(rank), leave(folder, rank, digests))[1]  # type: ignore[func-returns-value]
    config = case_config(CASES[1])
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    saver = Saver(engine, CheckpointStore(folder), eod_id=EOD, tokenizer_fingerprint="none")
    saver.save(1, 0)
    saver.finish()
    return noted, one_rank_fails(engine, folder)


def one_rank_fails(engine: TrainingEngine, folder: Path) -> list[str]:
    """What each rank says where the second alone cannot read its rows, or the checkpoint at all."""
    path = CheckpointStore(folder).latest()
    assert path is not None
    said = []
    for name in ("load_tables", "read_manifest"):
        for error in (CheckpointError("rows are missing"), OSError(5, "Input/output error")):
            real = getattr(resuming, name)

            def fail(*_: object, real: Any = real, error: Exception = error) -> Any:
                if engine.grid.rank == 1:
                    raise error
                return real(*_)

            setattr(resuming, name, fail)
            with pytest.raises(CheckpointError) as caught:
                load_checkpoint(engine, path)
            said.append(str(caught.value))
            setattr(resuming, name, real)
    load_checkpoint(engine, path)
    return said


def test_every_rank_leaves_a_note_and_hears_of_a_failure_of_another(tmp_path: Path) -> None:
    (noted, first), (noted_by_second, second) = run_ranks(2, noted_ranks, tmp_path)
    assert noted == [0] and noted_by_second == [1]
    assert first == second
    for message in first[::2]:
        assert message == "rows are missing"
    for message in first[1::2]:
        assert "rank 1 failed" in message and "Input/output error" in message


def failing_run(config: RunConfig, alone: bool) -> tuple[str, str]:
    """One rank's work: what it says, and the latest checkpoint then, where the disk is slow and step 3 fails.

    alone: the second rank's data goes away; else a weight is not a number on all.
    """
    folder = Path(config.training.output_directory)
    training = trainer.Trainer(config, device=CPU, num_threads=1)
    digest, one_step = saving.file_digest, training._one_step

    def slow_digest(path: Path) -> Digest:
        time.sleep(1.0)
        return digest(path)

    def failing_step(step: int, *others: Any) -> Any:
        if step == 2 and alone and training.grid.rank == 1:
            raise DataError("the set went away")
        if step == 2 and not alone:
            next(iter(training.engine.model.parameters())).data.fill_(float("nan"))
        return one_step(step, *others)

    saving.file_digest = slow_digest
    training._one_step = failing_step  # type: ignore[method-assign]
    try:
        training.run()
    except Exception as error:
        return str(error), (folder / "checkpoints/latest").read_text()
    raise AssertionError("it went on")


def slow_saves(trained_runs: TrainedRuns, output: Path) -> RunConfig:
    values = tiny_run_config(trained_runs.folder, "fp32").model_dump()
    values["training"] |= {"output_directory": str(output), "global_batch_size": 16, "train_iters": 5}
    values["checkpoint"] |= {"interval": 2}
    return RunConfig.model_validate(values)


def test_a_run_that_diverges_completes_the_checkpoint_under_way(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    for message, latest in run_ranks(2, failing_run, slow_saves(trained_runs, tmp_path / "run"), False):
        assert message.startswith("gradient norm is ") and "at optimizer step 3: stopped" in message
        assert latest == "step_00000002"


@pytest.mark.slow
def test_a_rank_that_fails_alone_leaves_when_the_checkpoint_is_complete(
    trained_runs: TrainedRuns, tmp_path: Path
) -> None:
    """The others hear of it when its process has ended."""
    (_, latest), failed = run_ranks(2, failing_run, slow_saves(trained_runs, tmp_path / "run"), True)
    assert failed == ("the set went away", "step_00000002")
    assert latest == "step_00000002"


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_schedules(kind: str) -> None:
    schedule = Schedule(kind=kind, peak=2.0, minimum=0.5, warmup_iters=4, total_iters=20, decay_iters=6)  # type: ignore[arg-type]
    rates = [schedule.at(step) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[-1] == pytest.approx(0.5)
    assert all(later <= earlier for earlier, later in pairwise(rates[3:]))
    flat = [rate for rate in rates[4:] if rate == 2.0]
    assert len(flat) == (10 if kind == "wsd" else 0)
    if kind == "cosine":
        assert rates[11] == pytest.approx(1.25)  # half way
