"""Resuming a run from a checkpoint of any layout, after checking that it is of the same model and undamaged.

All ranks must call these functions, and every rank learns of a failure on any other.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from overtok_megatron.checkpoint.changes import check_same_model, check_same_state, same_deepspeed_files
from overtok_megatron.checkpoint.deepspeed_state import MOMENTS, ParameterState
from overtok_megatron.checkpoint.dense import FOLDER as DENSE
from overtok_megatron.checkpoint.dense import read_parts
from overtok_megatron.checkpoint.layout import CheckpointLayout
from overtok_megatron.checkpoint.optimizer_state import read_optimizer_states
from overtok_megatron.checkpoint.store import Manifest, read_manifest, verify_file
from overtok_megatron.checkpoint.table_file import FOLDER as TABLES
from overtok_megatron.checkpoint.tables import load_rows, load_tables
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.parallel.splits import splits_of
from overtok_megatron.training.agreement import agree
from overtok_megatron.training.deepspeed.checkpoint_files import load_deepspeed_file
from overtok_megatron.training.deepspeed.engine_object import set_progress
from overtok_megatron.training.engine import TrainingEngine

_STATE_OF_GROUP = ("params", "step")  # the entries of a parameter group that are not settings; apex counts steps there


def layout_of(engine: TrainingEngine) -> CheckpointLayout:
    """This run's layout in the form that a checkpoint records.

    If both are equal DeepSpeed reads its own files; otherwise they are read parameter by parameter.
    """
    shape = engine.grid.shape
    return CheckpointLayout(
        pipeline=shape.pipe,
        data=shape.data,
        context=shape.context,
        tensor=shape.tensor,
        zero_stage=engine.config.parallel.zero_stage,
    )


def load_checkpoint(engine: TrainingEngine, path: Path) -> Manifest:
    """Load weights, rows and all optimizer state from a complete checkpoint of the same model, written on any layout.

    The checkpoint may be the run's own or another run's. On the same layout the next step has the same bits, on another layout
    the same numbers to rounding. Raises CheckpointError naming the first difference of the model, or the first damaged file.
    """
    config = engine.config.model_dump(mode="json")
    manifest = _checked_manifest(engine.grid, path, lambda found: check_same_state(config, found, path))
    agree(engine.grid, lambda: _verify_share(engine.grid, path, manifest, list(manifest.files)), path)
    if same_deepspeed_files(config, layout_of(engine), manifest):
        _load_deepspeed_files(engine, path)
    else:
        _load_by_parameter(engine, path, manifest)
    tables = engine.tables
    if tables is not None:
        agree(engine.grid, lambda: load_tables(path, tables), path)
    return manifest


def load_weights(engine: TrainingEngine, path: Path) -> Manifest:
    """Start from the dense weights and rows of a complete checkpoint of any layout, with or without optimizer state.

    Master weights start as the weights that were written, moments and row state as zeros; each rank reads its own part.
    Raises CheckpointError naming the first difference of the model, or the first damaged file.
    """
    config = engine.config.model_dump(mode="json")
    other_way = "start from another training.initial_checkpoint"
    manifest = _checked_manifest(engine.grid, path, lambda found: check_same_model(config, found, path, other_way))
    names = [name for name in manifest.files if name.startswith((DENSE, TABLES))]
    agree(engine.grid, lambda: _verify_share(engine.grid, path, manifest, names), path)
    parameters = dict(engine.model.named_parameters())
    splits = {name: splits_of(parameter) for name, parameter in parameters.items()}

    def read() -> None:
        for name, weight in read_parts(path, manifest.layout.model_parallel_ranks, splits):
            zeros = torch.zeros(weight.shape)
            state = ParameterState({"master": weight.float(), **dict.fromkeys(MOMENTS, zeros)}, 0)
            if parameters[name].requires_grad:
                engine.adapter.set_state(parameters[name], state)
            else:
                engine.adapter.set_frozen(parameters[name], weight)
        if engine.tables is not None:
            load_rows(path, engine.tables.store)

    agree(engine.grid, read, path)
    return manifest


def _checked_manifest(grid: ProcessGrid, path: Path, check: Callable[[Manifest], None]) -> Manifest:
    """The checkpoint's manifest, where every rank can read it and `check` raises no CheckpointError."""

    def read() -> Manifest:
        manifest = read_manifest(path)
        check(manifest)
        return manifest

    return agree(grid, read, path)


def _load_deepspeed_files(engine: TrainingEngine, path: Path) -> None:
    """Load DeepSpeed's own files, on the layout that wrote them. They hold settings too; this run keeps its own settings."""
    groups = engine.optimizer.param_groups
    own = [{name: value for name, value in group.items() if name not in _STATE_OF_GROUP} for group in groups]
    engine.deepspeed_files.load(path)
    for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
        group |= settings
    engine.adapter.set_max_norm(engine.config.optimizer.gradient_clipping)


def _verify_share(grid: ProcessGrid, path: Path, manifest: Manifest, names: list[str]) -> None:
    """Check the hashes of this rank's share of the files `names`; over all ranks each file is read once."""
    for name in sorted(names)[grid.rank :: grid.shape.world_size]:
        verify_file(path, name, manifest)


def _load_by_parameter(engine: TrainingEngine, path: Path, manifest: Manifest) -> None:
    """Dense weights and optimizer state from files that other ranks wrote, parameter by parameter."""
    parameters = dict(engine.model.named_parameters())
    splits = {name: splits_of(parameter) for name, parameter in parameters.items()}
    trained = {name: own for name, own in splits.items() if parameters[name].requires_grad}
    frozen = {name: own for name, own in splits.items() if name not in trained}

    def read() -> None:
        for name, state in read_optimizer_states(path, manifest.layout, trained, load_deepspeed_file):
            engine.adapter.set_state(parameters[name], state)
        for name, weight in read_parts(path, manifest.layout.model_parallel_ranks, frozen) if frozen else ():
            engine.adapter.set_frozen(parameters[name], weight)

    agree(engine.grid, read, path)
    set_progress(engine.deepspeed_engine, steps=manifest.step, samples=manifest.consumed_samples)
