"""Saving and resuming a run: the engine's files, the dense weights and the tables become one checkpoint, or none.

All functions are collectives: every rank calls them, and every rank learns of a failure on any other.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from overtok_megatron.checkpoint.dense import save_dense
from overtok_megatron.checkpoint.store import (
    MANIFEST,
    CheckpointStore,
    Manifest,
    file_digest,
    read_manifest,
    verify_file,
)
from overtok_megatron.checkpoint.tables import load_tables, save_tables
from overtok_megatron.errors import CheckpointError
from overtok_megatron.parallel.sharding import shard_of
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.engine_files import WRITE_ERRORS, reason

ENGINE_FOLDER = "engine"


def _gather(value: Any) -> list[Any]:
    """One object from every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def layout_of(trainer: TrainingEngine) -> dict[str, int]:
    """What must be equal for a resume: the engine's files are written per rank."""
    shape = trainer.grid.shape
    return {
        "pipeline_parallel_size": shape.pipe,
        "data_parallel_size": shape.data,
        "tensor_parallel_size": shape.model,
        "zero_stage": trainer.config.parallel.zero_stage,
    }


def save_state(
    trainer: TrainingEngine,
    store: CheckpointStore,
    *,
    step: int,
    consumed_samples: int,
    eod_id: int,
    tokenizer_fingerprint: str,
) -> Path:
    """Write a complete checkpoint of this moment and make it the latest.

    Raises CheckpointError on every rank if any rank could not write; the previous checkpoint stays the latest.
    """
    first = dist.get_rank() == 0
    folder = store.partial(step)
    written: list[str] = []

    def guarded(work: Callable[[], Any]) -> str | None:
        try:
            work()
        except WRITE_ERRORS as error:
            return reason(error)
        return None

    def write_ours() -> None:
        if trainer.grid.data_rank == 0:
            written.append(_write_dense(trainer, folder, dense))
        if trainer.tables is not None:
            written.extend(save_tables(folder, trainer.tables))

    _agree(store, step, guarded(lambda: store.begin(step)) if first else None)
    dense = trainer.dense_state()
    _agree(store, step, guarded(write_ours))
    files = trainer.engine_files
    files.failure = None
    try:
        trainer.engine.save_checkpoint(str(folder), tag=ENGINE_FOLDER, client_state={"step": step}, save_latest=False)
    except WRITE_ERRORS as error:  # what DeepSpeed writes beside its checkpoint engine
        files.failure = files.failure or reason(error)
    _agree(store, step, files.failure)
    digests = {name: file_digest(folder / name) for name in written}
    everyone: dict[str, tuple[int, str]] = {}
    for part in _gather(digests):
        everyone |= part
    if first:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if name not in everyone and name != MANIFEST:
                everyone[name] = file_digest(path)
    manifest = Manifest(
        step=step,
        consumed_samples=consumed_samples,
        config=trainer.config.model_dump(mode="json"),
        layout=layout_of(trainer),
        eod_id=eod_id,
        tokenizer_fingerprint=tokenizer_fingerprint,
        files=everyone,
    )
    _agree(store, step, guarded(lambda: store.publish(manifest)) if first else None)
    return folder.with_name(folder.name.split(".")[0])


def _write_dense(trainer: TrainingEngine, folder: Path, dense: dict[str, torch.Tensor]) -> str:
    splits = {}
    for name, parameter in trainer.model.named_parameters():
        shard = shard_of(parameter)
        if shard is not None:
            splits[name] = shard.dim
    shape = trainer.grid.shape
    return save_dense(folder, dense, splits, trainer.grid.tensor_rank, shape.model)


def _agree(store: CheckpointStore, step: int, failure: str | None) -> None:
    failures = [(rank, text) for rank, text in enumerate(_gather(failure)) if text]
    if failures:
        if dist.get_rank() == 0:
            with suppress(OSError):
                store.discard(step)
        dist.barrier()
        rank, text = failures[0]
        raise CheckpointError(
            f"could not save step {step} on rank {rank}: {text}; the previous checkpoint is intact, "
            "make room or change training.output_directory and start again to resume from it"
        )


def load_state(trainer: TrainingEngine, path: Path) -> Manifest:
    """Bring everything back from a complete checkpoint of the same layout and model.

    Raises CheckpointError naming the first difference of shape or layout, or the first damaged file.
    """
    manifest = read_manifest(path)
    _check_same(trainer, manifest, path)
    rank, world = dist.get_rank(), dist.get_world_size()
    damage: str | None = None
    try:
        for name in sorted(manifest.files)[rank::world]:  # every file once, over all ranks
            verify_file(path, name, manifest)
    except CheckpointError as error:
        damage = str(error)
    for text in _gather(damage):
        if text:
            raise CheckpointError(text)
    loaded, _ = trainer.engine.load_checkpoint(str(path), tag=ENGINE_FOLDER)
    if loaded is None:
        raise CheckpointError(f"{path / ENGINE_FOLDER}: DeepSpeed found no state to load")
    if trainer.tables is not None:
        load_tables(path, trainer.tables, with_optimizer=True)
    return manifest


def _check_same(trainer: TrainingEngine, manifest: Manifest, path: Path) -> None:
    ours = trainer.config.model_dump(mode="json")
    check_same_model(ours, manifest, path)
    for key, theirs in manifest.layout.items():
        mine = layout_of(trainer)[key]
        if mine != theirs:
            raise CheckpointError(
                f"{path}: written with {key} {theirs}, this run has {mine}; resume with the same "
                "layout, or set another training.output_directory"
            )
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
        "combine",
        "pad_id",
        "boundary",
        "hash_base",
    ),
}


def check_same_model(config: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """Raises CheckpointError naming the first key by which a config's model differs from the checkpoint's."""
    for section, keys in _SHAPE_KEYS.items():
        for key in keys or config[section]:
            mine, theirs = config[section].get(key), manifest.config[section].get(key)
            if key == "init_std" or mine == theirs:
                continue
            if section == "over_encoding" and key != "enabled" and not config[section]["enabled"]:
                continue
            raise CheckpointError(
                f"{path}: of another model: {section}.{key} is {theirs} there and {mine} in this run; "
                f"set it to {theirs}, or set another training.output_directory"
            )
