"""A trained model with more n-gram tables, or heads for later tokens, whose logits are what they were: new rows are zero.

The row space interleaves the rows of all tables by the sizes of all, so that with more tables every old row gets another id.
The rows are sorted by their new ids in two passes, each of which reads and writes sequentially. The first appends every old row
to a bucket on disk, one bucket per new file of rows; the second reads each bucket and writes its file. Memory: two files of
rows. Disk: the old tables once more, until the new ones are written.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from overtok_megatron.checkpoint.store import read_manifest, verify_checkpoint
from overtok_megatron.checkpoint.weights_only import read_dense_weights, read_rows, write_weights
from overtok_megatron.checkpoint.writing import FILE_BYTES
from overtok_megatron.config.growth import check_grown, same_tables
from overtok_megatron.config.problems import Locate
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate_model
from overtok_megatron.files import PARTIAL
from overtok_megatron.kernels.dtypes import DTYPES, ROW_DTYPES
from overtok_megatron.model.assembly import build_encoder, build_multi_token
from overtok_megatron.ngram.building import row_space
from overtok_megatron.ngram.row_space import RowSpace

SCRATCH = f"growing{PARTIAL}"  # folder of the buckets in the new run's folder, until the new checkpoint is written
_ROW_IDS = "row-ids"  # the column of new ids beside the columns of each row
_ENCODER = "embedding.over_encoding"


def grow(source: Path, output: Path, config: RunConfig, locate: Locate) -> Path:
    """Write the model of the checkpoint folder `source`, with the tables and heads that `config` adds, below `output`.

    The result is a checkpoint of weights at step 0, from which a run of `config` starts; returns its folder. New projections
    and heads have their usual initial values, from the run's seed. Raises ConfigError where the grown model would not compute
    the same or is not sound, CheckpointError where `source` is damaged or `output` holds checkpoints already or cannot be
    written.
    """
    manifest = read_manifest(source)
    old = RunConfig.model_validate(manifest.config)
    check_grown(old, config)
    validate_model(config, locate)
    verify_checkpoint(source)
    scratch = output / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # rows of a killed call would be appended to, and are perhaps cut
    try:
        return write_weights(
            output,
            config,
            _grown_dense(source, config),
            _grown_rows(source, old, config, scratch),
            eod_id=manifest.eod_id,
            tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _grown_dense(source: Path, config: RunConfig) -> Iterator[tuple[str, Tensor]]:
    """The old weights, then what they lack: projections of new tables, layers that predict later tokens."""
    known = set()
    for name, weight in read_dense_weights(source, read_manifest(source)):
        known.add(name)
        yield name, weight
    dtype, seed = DTYPES[config.training.precision], config.training.seed
    added: dict[str, nn.Module] = {}
    if config.over_encoding.enabled:
        encoder = added[_ENCODER] = build_encoder(config.model, config.over_encoding)
        encoder.reset(seed, _ENCODER)
    heads = build_multi_token(config)
    if heads is not None:
        heads.reset(seed, config.model.init_std)
        added["multi_token"] = heads
    for name, module in added.items():
        for key, parameter in module.named_parameters():
            if f"{name}.{key}" not in known:
                yield f"{name}.{key}", parameter.detach().to(dtype)


def _grown_rows(source: Path, old: RunConfig, new: RunConfig, scratch: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(first row id, columns) of the rows of the new row space, file by file."""
    if same_tables(old, new):
        if new.over_encoding.enabled:
            yield from read_rows(source)
        return
    space = row_space(new.model, new.over_encoding)
    dtype = ROW_DTYPES[new.over_encoding.row_dtype]
    columns: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight": (dtype, (space.width,))}
    if dtype == torch.int8:
        columns["scale"] = (torch.float32, ())
    rows_per_file = max(1, FILE_BYTES // (space.width * dtype.itemsize))
    buckets = _RowBuckets(scratch, rows_per_file)
    if old.over_encoding.enabled:
        old_space = row_space(old.model, old.over_encoding)
        for start, values in read_rows(source):
            buckets.append(_new_row_ids(old_space, space, start, values["weight"].shape[0]), values)
    for start in range(0, space.total_rows, rows_per_file):
        count = min(rows_per_file, space.total_rows - start)
        file = {name: torch.zeros(count, *shape, dtype=kind) for name, (kind, shape) in columns.items()}
        buckets.move_into(start, file)
        yield start, file


def _new_row_ids(old: RowSpace, new: RowSpace, start: int, count: int) -> Tensor:
    """The ids, in a row space with more tables, of the rows with ids [start, start + count) in the old one; [count] int64."""
    tables, rows = old.table_and_row_of(torch.arange(start, start + count))
    result = torch.empty_like(rows)
    for table in range(old.num_tables):
        in_table = tables == table
        result[in_table] = new.row_ids_of_table(table, rows[in_table])
    return result


class _RowBuckets:
    """Rows on disk in buckets, one per range of `rows_per_bucket` row ids, each in the order in which its rows were appended.

    A bucket is one file per column, with nothing but the values.
    """

    def __init__(self, folder: Path, rows_per_bucket: int) -> None:
        self._folder = folder
        self._rows_per_bucket = rows_per_bucket

    def _path(self, bucket: int, column: str) -> Path:
        return self._folder / f"{bucket}-{column}"

    def append(self, row_ids: Tensor, values: dict[str, Tensor]) -> None:
        """Append rows to their buckets. row_ids [r] int64; values: the columns [r, ...] of these rows by name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        buckets = row_ids // self._rows_per_bucket
        permutation = buckets.argsort(stable=True)
        numbers, counts = buckets.unique(return_counts=True)
        for name, column in {_ROW_IDS: row_ids, **values}.items():
            parts = column[permutation].split(counts.tolist())
            for bucket, part in zip(numbers.tolist(), parts, strict=True):
                with self._path(bucket, name).open("ab") as file:
                    part.contiguous().view(torch.uint8).numpy().tofile(file)

    def move_into(self, start: int, columns: dict[str, Tensor]) -> None:
        """Move the rows of the bucket that starts at row id `start` into columns [rows_per_bucket, ...] by name, in place."""
        bucket = start // self._rows_per_bucket
        path = self._path(bucket, _ROW_IDS)
        if not path.exists():
            return
        indices = torch.from_numpy(np.fromfile(path, dtype=np.int64)) - start
        path.unlink()
        for name, column in columns.items():
            path = self._path(bucket, name)
            raw = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
            column[indices] = raw.view(column.dtype).view(-1, *column.shape[1:])
            path.unlink()
