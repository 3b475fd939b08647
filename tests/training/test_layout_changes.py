"""A run saved on one layout goes on, on any other, with the losses of the run that was never interrupted (float32, 1e-5)."""

import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint import SubparamShape
from distributed_harness import run_ranks
from test_layout_matrix import CPU, EOD, TIED, Layout, configuration, layout, own_tokens, reference_run, stream

from overtok_megatron.checkpoint.engine_state import ENGINE_FOLDER, read_dense_states, stage_names
from overtok_megatron.checkpoint.store import CheckpointStore, read_manifest
from overtok_megatron.training.deepspeed.optimizer_state import load_engine_file
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.resuming import load_state
from overtok_megatron.training.saving import Saver

SAVED_AT, END = 3, 7
ADAM = {"optimizer": "adam", "added": [{"orders": [4, 2], "table_rows": 31}]}  # whose state must come along
LAYOUTS: dict[str, tuple[int, Layout]] = {
    "single": (1, layout("z1", micro=6, over=ADAM)),
    "DP2, ZeRO 1": (2, layout("z1", over=ADAM)),
    "DP4, ZeRO 3": (4, layout("z3", micro=3, over=ADAM)),
    "TP2xPP2": (4, layout("tp2 pp2 z1", micro=3, over=ADAM)),
}
OTHERS: dict[str, tuple[int, Layout]] = {
    "single, no ZeRO": (1, layout("", micro=6, over=ADAM, model=TIED)),
    "TP2, no ZeRO": (2, layout("tp2", micro=6, over=ADAM, model=TIED)),
    "CP2, ZeRO 2": (2, layout("cp2 z2", micro=6, over=ADAM, model=TIED)),
    "PP2, no ZeRO": (2, layout("pp2", over=ADAM, model=TIED)),
    "DP3, ZeRO 1, offload": (3, layout("z1 offload", over=ADAM, model=TIED)),
    "DP2, ZeRO 3": (2, layout("z3", over=ADAM, model=TIED)),
}


def start(case: Layout) -> TrainingEngine:
    config = configuration(case)
    return TrainingEngine(config, start_processes(config, CPU), CPU, EOD)


def train(trainer: TrainingEngine, begin: int, end: int) -> list[float]:
    batches = stream()[begin:end]
    return [trainer.step(own_tokens(trainer, batch), 3e-3).loss for batch in batches]


def save_layout(case: Layout, folder: Path) -> list[float]:
    """One rank's work: the first steps, and a checkpoint after them."""
    trainer = start(case)
    losses = train(trainer, 0, SAVED_AT)
    saver = Saver(trainer, CheckpointStore(folder), eod_id=EOD, tokenizer_fingerprint="none")
    saver.save(SAVED_AT, 0)
    saver.finish()
    return losses


def resume_layout(case: Layout, folders: list[Path]) -> list[list[float]]:
    """One rank's work: the last steps from every checkpoint."""
    results = []
    for folder in folders:
        trainer = start(case)
        path = CheckpointStore(folder).latest()
        assert path is not None
        assert load_state(trainer, path).step == SAVED_AT
        results.append(train(trainer, SAVED_AT, END))
    return results


def check_pairs(layouts: dict[str, tuple[int, Layout]], pairs: list[tuple[str, str]], folder: Path) -> None:
    _, some_case = next(iter(layouts.values()))
    expected = reference_run(some_case)[0][:END]
    for name in {source for source, _ in pairs}:
        world, case = layouts[name]
        for losses in run_ranks(world, save_layout, case, folder / name):
            assert losses == pytest.approx(expected[:SAVED_AT], rel=1e-5), name
    for name in {target for _, target in pairs}:
        world, case = layouts[name]
        sources = [source for source, target in pairs if target == name]
        for rank in run_ranks(world, resume_layout, case, [folder / source for source in sources], timeout=400):
            for source, losses in zip(sources, rank, strict=True):
                assert losses == pytest.approx(expected[SAVED_AT:], rel=1e-5), (source, name)


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_some_pairs_of_layouts(tmp_path: Path) -> None:
    pairs = [("TP2xPP2", "DP4, ZeRO 3"), ("DP4, ZeRO 3", "DP2, ZeRO 1"), ("DP2, ZeRO 1", "TP2xPP2")]
    check_pairs(LAYOUTS, pairs, tmp_path)
    for name in ("TP2xPP2", "DP4, ZeRO 3"):
        check_universal(tmp_path / name, tmp_path / "universal" / name)


def check_universal(run: Path, output: Path) -> None:
    """DeepSpeed's own converter reads the engine's files and finds what we find: whole weights and both moments."""
    checkpoint = CheckpointStore(run).latest()
    assert checkpoint is not None
    words = ["--input_folder", str(checkpoint / ENGINE_FOLDER), "--output_folder", str(output)]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words]
    done = subprocess.run(
        [*command, "--num_extract_workers", "1", "--num_merge_workers", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    layout_ = read_manifest(checkpoint).layout
    names = {
        name for stage in range(layout_["pipeline_parallel_size"]) for name in stage_names(checkpoint, stage, layout_)
    }
    assert {path.name for path in (output / "zero").iterdir() if path.is_dir()} == names
    for name, state in read_dense_states(checkpoint, layout_, dict.fromkeys(names), load_engine_file):
        for ours, theirs in (("master", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            with torch.serialization.safe_globals([SubparamShape]):  # where experts are split
                content = torch.load(output / "zero" / name / f"{theirs}.pt", weights_only=True)
            tensor = content["param"] if isinstance(content, dict) else content
            assert torch.equal(tensor.flatten(), state.values[ours].flatten()), (name, ours)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_pairs_of_layouts(tmp_path: Path) -> None:
    check_pairs(LAYOUTS, list(permutations(LAYOUTS, 2)), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_pairs_of_other_layouts_with_a_tied_head(tmp_path: Path) -> None:
    check_pairs(OTHERS, list(permutations(OTHERS, 2)), tmp_path)
