"""A checkpoint loaded into a fresh engine goes on with the same bits, for every ZeRO stage, split and row optimizer."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from distributed_harness import run_ranks
from test_training_numerics import EOD, SEQ, STEPS, Case, configuration, stream

from overtok_megatron.checkpoint.store import CheckpointStore
from overtok_megatron.training.engine import TrainingEngine, start_processes
from overtok_megatron.training.saving import Saver, leave_note
from overtok_megatron.training.schedules import Schedule
from overtok_megatron.training.state import load_state

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


def run(trainer: TrainingEngine, steps: range) -> list[float]:
    """Losses of some steps of the stream, on this rank's part of it."""
    tokens = stream(trainer.config.model.vocab_size)
    ranks, rank = trainer.grid.shape.data, trainer.grid.data_rank
    parts = [tokens[step].view(trainer.micro_batches, ranks, -1, SEQ + 1)[:, rank] for step in steps]
    return [trainer.step(part, 3e-3).loss for part in parts]


def resume_case(case: Case, folder: Path) -> tuple[list[float], list[float], bool]:
    """Losses of an unbroken run, of one that went through a checkpoint, and whether all weights agree in the end."""
    config = configuration(case)
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
    assert load_state(fresh, path).step == 2
    resumed = losses[:2] + run(fresh, range(2, STEPS))
    assert whole.tables is not None
    assert fresh.tables is not None
    same = torch.equal(whole.tables.shard.rows.weight, fresh.tables.shard.rows.weight)
    dense = fresh.dense_state()
    same &= all(torch.equal(weight, dense[name]) for name, weight in whole.dense_state().items())
    return losses, resumed, same


def resume_cases(cases: list[Case], folder: Path) -> list[tuple[list[float], list[float], bool]]:
    """One rank's work."""
    return [resume_case(case, folder / str(index)) for index, case in enumerate(cases)]


def test_resumed_engines_go_on_bit_for_bit(tmp_path: Path) -> None:
    for rank in run_ranks(2, resume_cases, CASES, tmp_path, timeout=200):
        for case, (losses, resumed, same) in zip(CASES, rank, strict=True):
            assert resumed == losses, case.name
            assert same, case.name


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


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_schedules(kind: str) -> None:
    schedule = Schedule(kind, peak=2.0, minimum=0.5, warmup_iters=4, total_iters=20, decay_iters=6)  # type: ignore[arg-type]
    rates = [schedule.at(step) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[-1] == pytest.approx(0.5)
    assert all(later <= earlier for earlier, later in pairwise(rates[3:]))
    flat = [rate for rate in rates[4:] if rate == 2.0]
    assert len(flat) == (10 if kind == "wsd" else 0)
    if kind == "cosine":
        assert rates[11] == pytest.approx(1.25)  # half way
