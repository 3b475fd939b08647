"""Resuming a run from a checkpoint of any layout, after checking that it is of the same model and undamaged.

All functions are collectives: every rank calls them, and every rank learns of a failure on any other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from overtok_megatron.checkpoint.changes import check_continuable, check_same_model, same_engine_files
from overtok_megatron.checkpoint.dense import FOLDER as DENSE
from overtok_megatron.checkpoint.dense import read_parts
from overtok_megatron.checkpoint.dense_state import read_dense_states
from overtok_megatron.checkpoint.engine_state import ENGINE_FOLDER, MOMENTS, ParameterState
from overtok_megatron.checkpoint.layout import CheckpointLayout
from overtok_megatron.checkpoint.store import Manifest, read_manifest, verify_file
from overtok_megatron.checkpoint.table_file import FOLDER as TABLES
from overtok_megatron.checkpoint.tables import load_rows, load_tables
from overtok_megatron.errors import CheckpointError, OvertokError
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.parallel.splits import splits_of
from overtok_megatron.training.deepspeed.checkpoint_files import READ_ERRORS, reason
from overtok_megatron.training.deepspeed.optimizer_state import load_engine_file, set_parameter_state
from overtok_megatron.training.engine import TrainingEngine

T = TypeVar("T")
_STATE_OF_GROUP = ("params", "step")  # of an optimizer's group, beside its settings; apex counts steps there


def layout_of(trainer: TrainingEngine) -> CheckpointLayout:
    """Who wrote the engine's files: on the same layout DeepSpeed reads them back, on another they are taken apart."""
    shape = trainer.grid.shape
    return CheckpointLayout(
        pipeline=shape.pipe,
        data=shape.data,
        context=shape.context,
        tensor=shape.tensor,
        zero_stage=trainer.config.parallel.zero_stage,
    )


def load_state(trainer: TrainingEngine, path: Path) -> Manifest:
    """Bring everything back from a complete checkpoint of the same model, whatever layout wrote it.

    On the same layout the next step has the same bits, on another the same numbers to rounding. Raises CheckpointError naming
    the first difference of the model, or the first damaged file.
    """
    config = trainer.config.model_dump(mode="json")
    manifest = _manifest(trainer.grid, path, lambda found: check_continuable(config, found, path))
    agree(trainer.grid, lambda: _verify(trainer.grid, path, manifest, list(manifest.files)), path)
    if same_engine_files(config, layout_of(trainer), manifest):
        _load_engine_files(trainer, path)
    else:
        _load_other_layout(trainer, path, manifest)
    tables = trainer.tables
    if tables is not None:
        agree(trainer.grid, lambda: load_tables(path, tables), path)
    return manifest


def load_weights(trainer: TrainingEngine, path: Path) -> Manifest:
    """Start from the dense weights and rows of a complete checkpoint of any layout, with or without optimizer state.

    Master weights begin at the weights as they were written, moments and row state at zero; each rank reads its own part.
    Raises CheckpointError naming the first difference of the model, or the first damaged file.
    """
    config = trainer.config.model_dump(mode="json")
    other_way = "start from another training.initial_checkpoint"
    manifest = _manifest(trainer.grid, path, lambda found: check_same_model(config, found, path, other_way))
    names = [name for name in manifest.files if name.startswith((DENSE, TABLES))]
    agree(trainer.grid, lambda: _verify(trainer.grid, path, manifest, names), path)
    parameters = dict(trainer.model.named_parameters())
    splits = {name: splits_of(parameter) for name, parameter in parameters.items()}

    def read() -> None:
        for name, weight in read_parts(path, manifest.layout.model_parallel_ranks, splits):
            zeros = torch.zeros(weight.shape)
            state = ParameterState({"master": weight.float(), **dict.fromkeys(MOMENTS, zeros)}, 0)
            set_parameter_state(trainer.engine, parameters[name], state)
        if trainer.tables is not None:
            load_rows(path, trainer.tables.store)

    agree(trainer.grid, read, path)
    return manifest


def agree(grid: ProcessGrid, work: Callable[[], T], place: Path) -> T:
    """Return what `work` returns, which must not wait for other ranks; an error on any is raised as CheckpointError on all.

    A rank that left alone would leave the others waiting for it in the next collective. place: for the message.
    """
    failure: str | None = None
    found: list[T] = []
    try:
        found.append(work())
    except OvertokError as error:
        failure = str(error)
    except READ_ERRORS as error:  # a file that went away, a disk that fails
        failure = f"{place}: rank {grid.rank} failed ({reason(error)}); the checkpoints are as they were"
    for text in grid.gather_objects(failure):
        if text:
            raise CheckpointError(text)
    return found[0]


def _manifest(grid: ProcessGrid, path: Path, check: Callable[[Manifest], None]) -> Manifest:
    """The checkpoint's manifest, where every rank can read it and `check` raises no CheckpointError."""

    def read() -> Manifest:
        manifest = read_manifest(path)
        check(manifest)
        return manifest

    return agree(grid, read, path)


def _load_engine_files(trainer: TrainingEngine, path: Path) -> None:
    """Load DeepSpeed's own files, on the layout that wrote them. They hold settings too, of which this run's own are kept."""
    groups = trainer.optimizer.param_groups
    asked = [{name: value for name, value in group.items() if name not in _STATE_OF_GROUP} for group in groups]
    loaded, _ = trainer.engine.load_checkpoint(str(path), tag=ENGINE_FOLDER)
    if loaded is None:
        raise CheckpointError(f"{path / ENGINE_FOLDER}: DeepSpeed found no state to load")
    for group, settings in zip(trainer.optimizer.param_groups, asked, strict=True):
        group |= settings
    optimizer = trainer.engine.optimizer
    if hasattr(optimizer, "clip_grad"):  # ZeRO's and bf16's classes clip by themselves
        optimizer.clip_grad = trainer.config.optimizer.gradient_clipping


def _verify(grid: ProcessGrid, path: Path, manifest: Manifest, names: list[str]) -> None:
    """Hash this rank's share of some files: every file once, over all ranks."""
    for name in sorted(names)[grid.rank :: grid.shape.world_size]:
        verify_file(path, name, manifest)


def _load_other_layout(trainer: TrainingEngine, path: Path, manifest: Manifest) -> None:
    """Dense weights and optimizer state from files that other ranks wrote, parameter by parameter."""
    parameters = dict(trainer.model.named_parameters())
    splits = {name: splits_of(parameter) for name, parameter in parameters.items()}

    def read() -> None:
        for name, state in read_dense_states(path, manifest.layout, splits, load_engine_file):
            set_parameter_state(trainer.engine, parameters[name], state)

    agree(trainer.grid, read, path)
    trainer.engine.global_steps = manifest.step
    trainer.engine.global_samples = manifest.consumed_samples
