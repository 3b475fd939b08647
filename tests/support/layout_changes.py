"""Checkpoints that one layout saves and another goes on from; and DeepSpeed's own converter on their files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint import SubparamShape

from overtok_megatron.checkpoint.deepspeed_state import DEEPSPEED_FOLDER
from overtok_megatron.checkpoint.optimizer_state import read_optimizer_states, stage_names
from overtok_megatron.checkpoint.store import CheckpointStore, read_manifest
from overtok_megatron.training.deepspeed.checkpoint_files import load_deepspeed_file
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.resuming import load_checkpoint
from overtok_megatron.training.saving import Saver
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, Layout, layout_config, own_tokens, reference_run, stream

SAVED_AT, END = 3, 7


def start(case: Layout) -> TrainingEngine:
    config = layout_config(case)
    return TrainingEngine(config, start_processes(config, CPU), CPU, EOD)


def train(engine: TrainingEngine, start: int, stop: int) -> list[float]:
    batches = stream(engine.extra_tokens - 1)[start:stop]
    return [engine.step(own_tokens(engine, batch), 3e-3).loss for batch in batches]


def save_layout(case: Layout, folder: Path) -> list[float]:
    """One rank's work: the first steps, and a checkpoint after them."""
    engine = start(case)
    losses = train(engine, 0, SAVED_AT)
    saver = Saver(engine, CheckpointStore(folder), eod_id=EOD, tokenizer_fingerprint="none")
    saver.save(SAVED_AT, 0)
    saver.finish()
    return losses


def resume_layout(case: Layout, folders: list[Path]) -> list[list[float]]:
    """One rank's work: the last steps from every checkpoint."""
    results = []
    for folder in folders:
        engine = start(case)
        path = CheckpointStore(folder).latest()
        assert path is not None
        assert load_checkpoint(engine, path).step == SAVED_AT
        results.append(train(engine, SAVED_AT, END))
    return results


def check_pairs(layouts: dict[str, tuple[int, Layout]], pairs: list[tuple[str, str]], folder: Path) -> None:
    _, some_case = next(iter(layouts.values()))
    expected = reference_run(some_case)[0][:END]
    for name in {source for source, _ in pairs}:
        world, case = layouts[name]
        for losses in run_ranks(world, save_layout, case, folder / name, timeout=400):
            assert losses == pytest.approx(expected[:SAVED_AT], rel=1e-5), name
    for name in {target for _, target in pairs}:
        world, case = layouts[name]
        sources = [source for source, target in pairs if target == name]
        for rank in run_ranks(world, resume_layout, case, [folder / source for source in sources], timeout=400):
            for source, losses in zip(sources, rank, strict=True):
                assert losses == pytest.approx(expected[SAVED_AT:], rel=1e-5), (source, name)


def check_universal(run: Path, output: Path) -> None:
    """DeepSpeed's own converter reads the engine's files and finds what we find: whole weights and both moments."""
    checkpoint = CheckpointStore(run).latest()
    assert checkpoint is not None
    words = ["--input_folder", str(checkpoint / DEEPSPEED_FOLDER), "--output_folder", str(output)]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words]
    done = subprocess.run(
        [*command, "--num_extract_workers", "1", "--num_merge_workers", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    layout_ = read_manifest(checkpoint).layout
    names = {name for stage in range(layout_.pipeline) for name in stage_names(checkpoint, layout_, stage)}
    assert {path.name for path in (output / "zero").iterdir() if path.is_dir()} == names
    for name, state in read_optimizer_states(checkpoint, layout_, dict.fromkeys(names, ()), load_deepspeed_file):
        for ours, theirs in (("master", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            with torch.serialization.safe_globals([SubparamShape]):  # where experts are split
                content = torch.load(output / "zero" / name / f"{theirs}.pt", weights_only=True)
            tensor = content["param"] if isinstance(content, dict) else content
            assert torch.equal(tensor.flatten(), state.values[ours].flatten()), (name, ours)
