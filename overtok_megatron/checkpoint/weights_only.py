"""Checkpoints of weights without a layout and without optimizer state: what conversions write, and what a run can start from.

A run continues nothing from such a checkpoint: it starts at step 0 with these weights and rows. They are written piece by
piece; neither the dense weights nor the tables are ever in memory as a whole.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from overtok_megatron.checkpoint.changes import check_continuable, check_same_model
from overtok_megatron.checkpoint.dense import dense_files, read_parts, save_dense
from overtok_megatron.checkpoint.layout import CheckpointLayout, LayoutKind
from overtok_megatron.checkpoint.store import (
    CheckpointStore,
    Digest,
    Manifest,
    file_digest,
    find_checkpoint,
    read_manifest,
)
from overtok_megatron.checkpoint.table_file import FOLDER, TableFile
from overtok_megatron.checkpoint.tables import merged_rows, write_rows
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import CheckpointError
from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.assembly import build_layers
from overtok_megatron.model.transformer import Transformer
from overtok_megatron.ngram.building import row_space

_FILE_BYTES = 1 << 28  # dense weights are gathered into files of about this size


def is_weights_only(manifest: Manifest) -> bool:
    """Whether a checkpoint holds no optimizer state: a run starts from it, and cannot resume."""
    return manifest.layout.kind is LayoutKind.WEIGHTS_ONLY


@dataclass(frozen=True)
class StartingPoint:
    """A complete checkpoint from which a run begins: at step 0 with its weights where `fresh`, else where it stopped."""

    path: Path
    fresh: bool


def starting_point(config: RunConfig) -> StartingPoint | None:
    """The run's own latest checkpoint, or the one that training.initial_checkpoint names, or neither.

    Raises CheckpointError where the one that is named is not there, or where the configuration differs from the
    checkpoint's in a key that cannot change.
    """
    own = CheckpointStore(Path(config.training.output_directory)).latest() if config.training.resume == "auto" else None
    values = config.model_dump(mode="json")
    if own is not None:
        manifest = read_manifest(own)
        fresh = is_weights_only(manifest)
        (check_same_model if fresh else check_continuable)(values, manifest, own)
        return StartingPoint(own, fresh)
    if config.training.initial_checkpoint is None:
        return None
    try:
        path = find_checkpoint(Path(config.training.initial_checkpoint))
        check_same_model(values, read_manifest(path), path, "start from another one")
        return StartingPoint(path, fresh=True)
    except CheckpointError as error:
        raise CheckpointError(f"training.initial_checkpoint: {error}") from None


def weight_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of a model's dense weights, without making any."""
    with torch.device("meta"):
        model = Transformer(build_layers(config.model, config.over_encoding, kernels=Kernels()))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def read_dense_weights(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """The whole dense weights of a checkpoint of any layout, one after the other, in the dtype in which they were written."""
    return read_parts(folder, manifest.layout.model_parallel_ranks)


def read_rows(folder: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(first place in the row space, `weight` [r, w] and for int8 `scale` [r]) of a checkpoint's rows, a file at a time.

    Increments are merged. Memory: a file of rows.
    """
    for file, values, _ in merged_rows(folder):
        yield file.start, {name: values[name] for name in ("weight", "scale") if name in values}


def write_weights(
    run: Path,
    config: RunConfig,
    dense: Iterable[tuple[str, Tensor]],
    rows: Iterable[tuple[int, dict[str, Tensor]]] = (),
    *,
    eod_id: int,
    tokenizer_fingerprint: str,
) -> Path:
    """Write a checkpoint of step 0 into the run folder `run`, name it the latest there, and return its folder.

    dense: every weight of `weight_shapes(config)` whole, in any order and floating dtype. rows: (first place, columns) in
    ascending places without a gap, `weight` of the configured row_dtype [r, w], and `scale` [r] float32 for int8. Both
    are read once, a piece at a time. Raises CheckpointError, and leaves nothing, where a weight is missing, unknown or
    of another shape, or rows are, or where the run has checkpoints already.
    """
    store = CheckpointStore(run)
    if store.complete():
        raise CheckpointError(f"{run}: holds checkpoints already; name another output folder, or remove them")
    store.clean()
    folder = store.start_save(0)
    try:
        files = _write_dense(folder, dense, weight_shapes(config))
        layout = CheckpointLayout(pipeline=len(files), kind=LayoutKind.WEIGHTS_ONLY)
        files |= _write_rows(folder, rows, config)
        return store.publish(
            Manifest(
                step=0,
                consumed_samples=0,
                config=config.model_dump(mode="json"),
                layout=layout,
                eod_id=eod_id,
                tokenizer_fingerprint=tokenizer_fingerprint,
                files=files,
            )
        )
    except (OSError, SafetensorError) as error:
        store.discard(0)
        raise CheckpointError(f"{folder}: cannot be written ({' '.join(str(error).split())})") from None
    except BaseException:
        store.discard(0)
        raise


def _write_dense(
    folder: Path, dense: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Digest]:
    """Files of about equal size; they get their numbers when it is known how many they are."""
    missing = dict(shapes)
    held: dict[str, Tensor] = {}
    pieces: list[Path] = []

    def flush() -> None:
        piece = folder / f"piece-{len(pieces)}"
        piece.mkdir()
        pieces.append(piece / save_dense(piece, held, {}, 0, 1))
        held.clear()

    for name, weight in dense:
        if name not in missing:
            raise CheckpointError(f"{folder}: {name} is no weight of this model, or comes twice")
        if tuple(weight.shape) != missing.pop(name):
            raise CheckpointError(
                f"{folder}: {name} has shape {list(weight.shape)}, the model needs {list(shapes[name])}"
            )
        held[name] = weight
        if sum(tensor.nbytes for tensor in held.values()) >= _FILE_BYTES:
            flush()
    if missing:
        raise CheckpointError(f"{folder}: {min(missing)} is missing among the weights")
    if held:
        flush()
    (folder / "dense").mkdir()
    digests = {}
    for piece, name in zip(pieces, dense_files(len(pieces)), strict=True):
        piece.rename(folder / name)
        shutil.rmtree(piece.parent.parent)
        digests[name] = file_digest(folder / name)
    return digests


def _write_rows(folder: Path, rows: Iterable[tuple[int, dict[str, Tensor]]], config: RunConfig) -> dict[str, Digest]:
    space = row_space(config.model, config.over_encoding) if config.over_encoding.enabled else None
    end, total, width = 0, 0 if space is None else space.total_rows, 0 if space is None else space.width
    digests: dict[str, Digest] = {}
    for start, values in rows:
        weight = values["weight"]
        if start != end or weight.shape[1] != width or end + weight.shape[0] > total:
            raise CheckpointError(
                f"{folder / FOLDER}: {weight.shape[0]} rows of width {weight.shape[1]} from {start}; "
                f"expected from {end}, of width {width}, {total} in all"
            )
        end += weight.shape[0]
        own = {**values, "touched": torch.zeros(weight.shape[0], dtype=torch.uint8)}
        digests |= write_rows(folder, TableFile.full(start, end), own, steps=0)
    if end != total:
        raise CheckpointError(f"{folder / FOLDER}: {end} of {total} rows")
    return digests
