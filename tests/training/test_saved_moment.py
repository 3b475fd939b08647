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


def save_late(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """One rank's work: weights at a save, after a further step, and in the checkpoint that is written then; what was synced."""
    config = layout_config(layout("z1", micro=12, training={"precision": "bf16"}))
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
    engine.step(own_tokens(engine, next(batches)), 3e-3)
    stepped.set()
    saver.finish()
    path = CheckpointStore(folder).latest()
    assert path is not None
    return before, engine.dense_weights(), dict(read_dense_weights(path, read_manifest(path))), synced


def test_weights_are_those_of_the_save(tmp_path: Path) -> None:
    ((before, after, saved, synced),) = run_ranks(1, save_late, tmp_path)
    assert saved.keys() == before.keys()
    for name, weight in saved.items():
        assert torch.equal(weight, before[name]), name
        assert not torch.equal(weight, after[name]), name
    (folder,) = tmp_path.rglob("engine")
    assert sorted(synced) == sorted(path.name for path in folder.glob("*.pt"))
