"""A trained model with more n-gram tables, which computes what it computed: new rows are zero, old ones change their places.

Rows of all tables are dealt over one row space by the sizes of all, so that every old row moves. They are sorted in two
passes, each of which reads and writes in order: from the old files into one heap of rows for each new file, and from the
heaps into the files. Memory: two files of rows. Disk: the old tables once more, for as long as it takes.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from overtok_megatron.checkpoint.store import read_manifest, verify_checkpoint
from overtok_megatron.checkpoint.weights_only import read_dense_weights, read_rows, write_weights
from overtok_megatron.config.growth import check_grown
from overtok_megatron.config.problems import Locate
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate_model
from overtok_megatron.files import PARTIAL
from overtok_megatron.kernels.dtypes import DTYPES, ROW_DTYPES
from overtok_megatron.model.assembly import build_encoder
from overtok_megatron.ngram.building import row_space
from overtok_megatron.ngram.row_space import RowSpace

_FILE_BYTES = 1 << 28  # rows are written in files of about this size
HEAPS = f"growing{PARTIAL}"  # in the new run's folder, while it is made
_PLACES = "place"
_ENCODER = "embedding.over_encoding"


def grow(source: Path, output: Path, config: RunConfig, locate: Locate) -> Path:
    """Write the model of the checkpoint folder `source`, with the tables that `config` has beyond its own, below `output`.

    A checkpoint of weights at step 0, from which a run of `config` starts; returns its folder. New projections have their
    usual initial values, from the run's seed. Raises ConfigError where the grown model would not compute the same or is
    not sound, CheckpointError where `source` is damaged or `output` holds checkpoints already or cannot be written.
    """
    manifest = read_manifest(source)
    old = RunConfig.model_validate(manifest.config)
    check_grown(old, config)
    validate_model(config, locate)
    verify_checkpoint(source)
    aside = output / HEAPS
    try:
        return write_weights(
            output,
            config,
            _dense(source, config),
            _rows(source, old, config, aside),
            eod_id=manifest.eod_id,
            tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        )
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _dense(source: Path, config: RunConfig) -> Iterator[tuple[str, Tensor]]:
    """The old weights, then the projections that they lack."""
    known = set()
    for name, weight in read_dense_weights(source, read_manifest(source)):
        known.add(name)
        yield name, weight
    encoder = build_encoder(config.model, config.over_encoding)
    encoder.reset(config.training.seed, _ENCODER)
    for key, parameter in encoder.named_parameters():
        if f"{_ENCODER}.{key}" not in known:
            yield f"{_ENCODER}.{key}", parameter.detach().to(DTYPES[config.training.precision])


def _rows(source: Path, old: RunConfig, new: RunConfig, aside: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The rows of the new row space, a file at a time."""
    space = row_space(new.model, new.over_encoding)
    dtype = ROW_DTYPES[new.over_encoding.row_dtype]
    columns: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight": (dtype, (space.width,))}
    if dtype == torch.int8:
        columns["scale"] = (torch.float32, ())
    step = max(1, _FILE_BYTES // (space.width * dtype.itemsize))
    heaps = _Heaps(aside, step)
    if old.over_encoding.enabled:
        before = row_space(old.model, old.over_encoding)
        for start, values in read_rows(source):
            heaps.add(moved_places(before, space, start, values["weight"].shape[0]), values)
    for start in range(0, space.total_rows, step):
        count = min(step, space.total_rows - start)
        part = {name: torch.zeros(count, *shape, dtype=kind) for name, (kind, shape) in columns.items()}
        heaps.take(start, part)
        yield start, part


def moved_places(old: RowSpace, new: RowSpace, start: int, count: int) -> Tensor:
    """Where the rows at places [start, start + count) of a row space lie in one with more tables, [count] int64."""
    tables, rows = old.rows_at(torch.arange(start, start + count))
    result = torch.empty_like(rows)
    for table in range(old.num_tables):
        own = tables == table
        result[own] = new.places(table, rows[own])
    return result


class _Heaps:
    """Rows on disk, one heap for each range of `step` places of the new row space, in the order in which they came."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        self._step = step

    def _path(self, heap: int, column: str) -> Path:
        return self._folder / f"{heap}-{column}"

    def add(self, places: Tensor, values: dict[str, Tensor]) -> None:
        """places [r] int64 in the new row space, and what belongs to each row, [r, ...] by name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        heaps = places // self._step
        order = heaps.argsort(stable=True)
        numbers, counts = heaps.unique(return_counts=True)
        for name, column in {_PLACES: places, **values}.items():
            parts = column[order].split(counts.tolist())
            for heap, part in zip(numbers.tolist(), parts, strict=True):
                with self._path(heap, name).open("ab") as file:
                    part.contiguous().view(torch.uint8).numpy().tofile(file)

    def take(self, start: int, into: dict[str, Tensor]) -> None:
        """Put the rows of the heap that begins at place `start` where they belong in tensors [step, ...] by name."""
        heap = start // self._step
        path = self._path(heap, _PLACES)
        if not path.exists():
            return
        places = torch.from_numpy(np.fromfile(path, dtype=np.int64)) - start
        path.unlink()
        for name, target in into.items():
            path = self._path(heap, name)
            raw = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
            target[places] = raw.view(target.dtype).view(-1, *target.shape[1:])
            path.unlink()
