"""A checkpoint's weights are those of the moment of the save, however late they are written; all its files reach the disk."""

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.checkpoint.store import CheckpointStore, read_manifest
from overtok_megatron.checkpoint.weights_only import read_dense_weights
from overtok_megatron.training import saving
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.saving import Saver
from support.distributed_harness import run_ranks
from support.layouts import EOD, layout, layout_config, own_tokens, stream

CPU = torch.device("cpu")


def save_late(folder: Path, short: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """One rank's work: weights at a save, after two more steps, and in the checkpoint that is written then; what was synced."""
    config = layout_config(layout(short, training={"precision": "bf16"}))
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    stepped, real_save, real_sync, synced = threading.Event(), saving.save_dense, saving.sync, []

    def save_dense(*arguments: Any) -> str:
        assert stepped.wait(60)
        return real_save(*arguments)

    def sync(path: Path) -> None:
        real_sync(path)
        synced.append(path.name)

    saving.save_dense, saving.sync = save_dense, sync  # in this rank's own process
    batches = iter(stream())
    engine.step(own_tokens(engine, next(batches)), 3e-3)
    saver = Saver(engine, CheckpointStore(folder), eod_id=EOD, tokenizer_fingerprint="none")
    saver.save(1, 0)
    before = {name: weight.clone() for name, weight in engine.dense_weights().items()}
    for _ in range(2):
        engine.step(own_tokens(engine, next(batches)), 3e-3)
    stepped.set()
    saver.finish()
    path = CheckpointStore(folder).latest()
    assert path is not None
    saving.save_dense, saving.sync = real_save, real_sync
    return before, engine.dense_weights(), dict(read_dense_weights(path, read_manifest(path))), synced


def late_saves(folder: Path) -> list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[str]]]:
    return [save_late(folder / short, short) for short in ("z1", "z3")]


def test_weights_are_those_of_the_save(tmp_path: Path) -> None:
    for short, (before, after, saved, synced) in zip(("z1", "z3"), run_ranks(1, late_saves, tmp_path)[0], strict=True):
        assert saved.keys() == before.keys()
        for name, weight in saved.items():
            assert torch.equal(weight, before[name]), name
            assert not torch.equal(weight, after[name]), name
        (folder,) = (tmp_path / short).rglob("engine")
        assert sorted(synced) == sorted(path.name for path in folder.glob("*.pt"))
