"""Resuming a run from a checkpoint of any layout, after checking that it is of the same model and undamaged.

All functions are collectives: every rank calls them, and every rank learns of a failure on any other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from overtok_megatron.checkpoint.dense import FOLDER as DENSE
from overtok_megatron.checkpoint.dense import read_parts
from overtok_megatron.checkpoint.engine_state import ENGINE_FOLDER, MOMENTS, ParameterState, read_dense_states
from overtok_megatron.checkpoint.store import Manifest, read_manifest, verify_file
from overtok_megatron.checkpoint.tables import FOLDER as TABLES
from overtok_megatron.checkpoint.tables import load_tables
from overtok_megatron.errors import CheckpointError
from overtok_megatron.parallel.sharding import shard_of
from overtok_megatron.training.dense_state import load_engine_file, set_parameter_state
from overtok_megatron.training.engine import TrainingEngine


def gather(value: Any) -> list[Any]:
    """One object from every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def layout_of(trainer: TrainingEngine) -> dict[str, int]:
    """Who wrote the engine's files: on the same layout DeepSpeed reads them back, on another they are taken apart."""
    shape = trainer.grid.shape
    return {
        "pipeline_parallel_size": shape.pipe,
        "data_parallel_size": shape.data,
        "context_parallel_size": shape.context,
        "tensor_parallel_size": shape.model,
        "zero_stage": trainer.config.parallel.zero_stage,
    }


def load_state(trainer: TrainingEngine, path: Path) -> Manifest:
    """Bring everything back from a complete checkpoint of the same model, whatever layout wrote it.

    On the same layout the next step has the same bits, on another the same numbers to rounding. Raises CheckpointError naming
    the first difference of the model, or the first damaged file.
    """
    manifest = read_manifest(path)
    _check_same(trainer, manifest, path)
    _agree(lambda: _verify(path, manifest, list(manifest.files)))
    if manifest.layout == layout_of(trainer):
        loaded, _ = trainer.engine.load_checkpoint(str(path), tag=ENGINE_FOLDER)
        if loaded is None:
            raise CheckpointError(f"{path / ENGINE_FOLDER}: DeepSpeed found no state to load")
    else:
        _load_other_layout(trainer, path, manifest)
    if trainer.tables is not None:
        load_tables(path, trainer.tables)
    return manifest


def load_weights(trainer: TrainingEngine, path: Path) -> Manifest:
    """Start from the dense weights and rows of a complete checkpoint of any layout, with or without optimizer state.

    Master weights begin at the weights as they were written, moments and row state at zero; each rank reads its own part.
    Raises CheckpointError naming the first difference of the model, or the first damaged file.
    """
    manifest = read_manifest(path)
    check_same_model(
        trainer.config.model_dump(mode="json"), manifest, path, "start from another training.initial_checkpoint"
    )
    names = [name for name in manifest.files if name.startswith((DENSE, TABLES))]
    _agree(lambda: _verify(path, manifest, names))
    parameters = dict(trainer.model.named_parameters())
    shards = {name: shard_of(parameter) for name, parameter in parameters.items()}
    ranks = manifest.layout["pipeline_parallel_size"] * manifest.layout["tensor_parallel_size"]

    def read() -> None:
        for name, weight in read_parts(path, ranks, shards):
            zeros = torch.zeros(weight.shape)
            state = ParameterState({"master": weight.float(), **dict.fromkeys(MOMENTS, zeros)}, 0)
            set_parameter_state(trainer.engine, parameters[name], state)
        if trainer.tables is not None:
            load_tables(path, trainer.tables, weights_only=True)

    _agree(read)
    return manifest


def _agree(work: Callable[[], None]) -> None:
    """Do this rank's work; a CheckpointError on any rank is raised on all."""
    failure: str | None = None
    try:
        work()
    except CheckpointError as error:
        failure = str(error)
    for text in gather(failure):
        if text:
            raise CheckpointError(text)


def _verify(path: Path, manifest: Manifest, names: list[str]) -> None:
    """Hash this rank's share of some files: every file once, over all ranks."""
    for name in sorted(names)[dist.get_rank() :: dist.get_world_size()]:
        verify_file(path, name, manifest)


def _load_other_layout(trainer: TrainingEngine, path: Path, manifest: Manifest) -> None:
    """Dense weights and optimizer state from files that other ranks wrote, parameter by parameter."""
    parameters = dict(trainer.model.named_parameters())
    shards = {name: shard_of(parameter) for name, parameter in parameters.items()}

    def read() -> None:
        for name, state in read_dense_states(path, manifest.layout, shards, load_engine_file):
            set_parameter_state(trainer.engine, parameters[name], state)

    _agree(read)
    trainer.engine.global_steps = manifest.step
    trainer.engine.global_samples = manifest.consumed_samples


def _check_same(trainer: TrainingEngine, manifest: Manifest, path: Path) -> None:
    ours = trainer.config.model_dump(mode="json")
    check_same_model(ours, manifest, path)
    if ours["training"]["precision"] != manifest.config["training"]["precision"]:
        raise CheckpointError(
            f"{path}: written with training.precision {manifest.config['training']['precision']}, "
            f"this run has {ours['training']['precision']}; use the same"
        )


_SHAPE_KEYS = {
    "model": None,
    "over_encoding": (
        "enabled",
        "ngram_order",
        "num_slices",
        "table_rows",
        "row_width",
        "added",
        "combine",
        "pad_id",
        "boundary",
        "hash_base",
        "row_dtype",
    ),
}


def _shape_of(key: str, value: Any) -> Any:
    """What of a key's value makes the model; whether added tables take updates does not."""
    if key == "added":
        return [{name: own for name, own in group.items() if name != "frozen"} for group in value or []]
    return value


def check_same_model(
    config: dict[str, Any], manifest: Manifest, path: Path, other_way: str = "set another training.output_directory"
) -> None:
    """Raises CheckpointError naming the first key by which a config's model differs from the checkpoint's.

    other_way: what to do instead of changing the model.
    """
    for section, keys in _SHAPE_KEYS.items():
        for key in keys or config[section]:
            mine, theirs = (_shape_of(key, values[section].get(key)) for values in (config, manifest.config))
            if key == "init_std" or mine == theirs:
                continue
            if section == "over_encoding" and key != "enabled" and not config[section]["enabled"]:
                continue
            raise CheckpointError(
                f"{path}: of another model: {section}.{key} is {theirs} there and {mine} in this run; "
                f"set it to {theirs}, or {other_way}"
            )
