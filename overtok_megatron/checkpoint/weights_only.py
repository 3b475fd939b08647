"""Checkpoints of whole weights without optimizer state: what conversions write, and what a run can start from.

A run starts at step 0 with the weights and rows of such a checkpoint; there is nothing in it that a run could go on from. The
weights are written piece by piece: neither the dense weights nor the tables are ever in memory as a whole.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from overtok_megatron.checkpoint.dense import FOLDER as DENSE
from overtok_megatron.checkpoint.dense import dense_files, read_parts, save_dense
from overtok_megatron.checkpoint.layout import CheckpointLayout, LayoutKind
from overtok_megatron.checkpoint.store import CheckpointStore, Digest, Manifest, file_digest
from overtok_megatron.checkpoint.table_file import FOLDER as TABLES
from overtok_megatron.checkpoint.table_file import TableFile
from overtok_megatron.checkpoint.tables import merged_rows, write_rows
from overtok_megatron.checkpoint.writing import FILE_BYTES
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import CheckpointError
from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.assembly import build_layers
from overtok_megatron.model.transformer import Transformer
from overtok_megatron.ngram.building import row_space


def weight_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of a model's dense weights, without allocating any."""
    with torch.device("meta"):
        layers = build_layers(
            config.model,
            config.over_encoding,
            over_decoding=config.over_decoding,
            multi_token=config.multi_token_prediction,
            kernels=Kernels(),
        )
        model = Transformer(layers)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def read_dense_weights(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """The whole dense weights of a checkpoint of any layout, one after the other, in the dtype in which they were written."""
    return read_parts(folder, manifest.layout.model_parallel_ranks)


def read_rows(folder: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(first row id, `weight` [r, w] and for int8 `scale` [r]) of a checkpoint's rows, file by file.

    Increments are merged. Memory: one file of rows.
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

    dense: every weight of `weight_shapes(config)` whole, in any order and floating dtype. rows: (first row id, columns) in
    ascending order without a gap, `weight` of the configured row_dtype [r, w], and `scale` [r] float32 for int8. Both
    are read once, piece by piece. Raises CheckpointError, and leaves nothing, where a weight is missing, unknown or of
    another shape, where rows are, or where the run has checkpoints already.
    """
    store = CheckpointStore(run)
    if store.complete():
        raise CheckpointError(f"{run}: holds checkpoints already; name another output folder, or remove them")
    store.clean()
    folder = store.start_save(0)
    try:
        dense_digests = _write_dense(folder, dense, weight_shapes(config))
        manifest = Manifest(
            step=0,
            consumed_samples=0,
            config=config.model_dump(mode="json"),
            layout=CheckpointLayout(pipeline=len(dense_digests), kind=LayoutKind.WEIGHTS_ONLY),
            eod_id=eod_id,
            tokenizer_fingerprint=tokenizer_fingerprint,
            files=dense_digests | _write_rows(folder, rows, config),
        )
        return store.publish(manifest)
    except (OSError, SafetensorError) as error:
        store.discard(0)
        raise CheckpointError(f"{folder}: cannot be written ({' '.join(str(error).split())})") from None
    except BaseException:
        store.discard(0)
        raise


def _write_dense(
    folder: Path, dense: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Digest]:
    """Write files of about equal size; they get their numbers once it is known how many there are."""
    pieces: list[Path] = []
    for number, weights in enumerate(_gather(folder, dense, shapes)):
        piece = folder / f"piece-{number}"
        piece.mkdir()
        pieces.append(piece / save_dense(piece, weights, {}, 0, 1))
    (folder / DENSE).mkdir()
    digests = {}
    for path, name in zip(pieces, dense_files(len(pieces)), strict=True):
        path.rename(folder / name)
        shutil.rmtree(path.parent.parent)
        digests[name] = file_digest(folder / name)
    return digests


def _gather(
    folder: Path, dense: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]]
) -> Iterator[dict[str, Tensor]]:
    """Weights by name for one file after the other, checked to be those of `shapes`. The dictionary is emptied after use."""
    missing = dict(shapes)
    gathered: dict[str, Tensor] = {}
    for name, weight in dense:
        if name not in missing:
            raise CheckpointError(f"{folder}: {name} is no weight of this model, or comes twice")
        if tuple(weight.shape) != missing.pop(name):
            raise CheckpointError(
                f"{folder}: {name} has shape {list(weight.shape)}, the model needs {list(shapes[name])}"
            )
        gathered[name] = weight
        if sum(tensor.nbytes for tensor in gathered.values()) >= FILE_BYTES:
            yield gathered
            gathered.clear()
    if missing:
        raise CheckpointError(f"{folder}: {min(missing)} is missing among the weights")
    if gathered:
        yield gathered


def _write_rows(folder: Path, rows: Iterable[tuple[int, dict[str, Tensor]]], config: RunConfig) -> dict[str, Digest]:
    space = row_space(config.model, config.over_encoding) if config.over_encoding.enabled else None
    total, width = (0, 0) if space is None else (space.total_rows, space.width)
    next_id = 0
    digests: dict[str, Digest] = {}
    for start, values in rows:
        weight = values["weight"]
        if start != next_id or weight.shape[1] != width or next_id + weight.shape[0] > total:
            raise CheckpointError(
                f"{folder / TABLES}: {weight.shape[0]} rows of width {weight.shape[1]} from {start}; "
                f"expected from {next_id}, of width {width}, {total} in all"
            )
        next_id += weight.shape[0]
        columns = {**values, "touched": torch.zeros(weight.shape[0], dtype=torch.uint8)}
        digests |= write_rows(folder, TableFile.full(start, next_id), columns, steps=0)
    if next_id != total:
        raise CheckpointError(f"{folder / TABLES}: {next_id} of {total} rows")
    return digests
