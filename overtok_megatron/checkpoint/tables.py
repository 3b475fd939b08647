"""Table rows as safetensors files by global row range: written by any number of ranks, read by any other number.

`tables/rows-<start>-<stop>.safetensors` holds rows [start, stop): `weight`, `touched` and every optimizer state.
`tables/changed-<n>-<start>-<stop>.safetensors` holds, beside their global numbers in `rows`, only those of [start, stop)
that changed since the save before; n = 1, 2, ... counts them. A checkpoint has all files that it needs: what an incremental
save does not write again it links, so that removing the older checkpoint takes nothing away.
Metadata: the range and the optimizer's step count, of which the last file's holds.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.checkpoint.dense import open_tensors
from overtok_megatron.checkpoint.store import Digest, file_digest
from overtok_megatron.checkpoint.writing import save_tensors
from overtok_megatron.errors import CheckpointError
from overtok_megatron.ngram.row_store import RowStore
from overtok_megatron.ngram.sharded_tables import ShardedTables
from overtok_megatron.ngram.snapshot import RowSnapshot

FOLDER = "tables"
_FILE_BYTES = 1 << 28  # rows are written in files of about this size, which bounds the memory of a save
_PIECE_BYTES = 1 << 24  # copied at a time, during which no row can change


@dataclass(frozen=True)
class Chain:
    """The files that a rank's rows are in after a save: the full ones and the increments on them, with their digests."""

    folder: Path
    files: dict[str, Digest]
    increments: int


class TableWriter:
    """Saves one rank's rows, all of them or those that changed, in two halves.

    `begin` notes what is to be written and takes no time that grows with the tables but for one flag a row; the function that
    it returns writes, on any thread, while rows go on changing. increments: how many saves may build on a full one.
    """

    def __init__(self, tables: ShardedTables, increments: int) -> None:
        self._tables = tables
        self._store = tables.store
        self._optimizer = tables.optimizer
        self._limit = increments
        self._chain: Chain | None = None

    def forget(self) -> None:
        """The next save is a full one: the last was not completed, so it is not known what has changed since."""
        self._chain = None

    def begin(self, folder: Path) -> Callable[[], dict[str, Digest]]:
        """Start a save below `folder`; call what is returned once, to write: it returns the files with their digests."""
        store = self._store
        chain, self._chain = self._chain, None
        changed = store.take_changed()
        full = chain is None or chain.increments >= self._limit or 2 * changed.numel() > store.num_rows
        if store.num_rows == 0:
            return dict
        metadata = {"start": str(store.start), "stop": str(store.stop), "steps": str(self._optimizer.steps)}
        if full or chain is None:
            snapshot = self._tables.snapshot = RowSnapshot(self._tables.columns())
            return lambda: self._finish(folder, self._write_all(folder, snapshot, metadata), 0)
        values = {name: _rows_to_host(column, changed) for name, column in self._tables.columns().items()}
        values["rows"] = changed.cpu() + store.start
        return lambda: self._finish(folder, self._write_changed(folder, chain, values, metadata), chain.increments + 1)

    def _finish(self, folder: Path, files: dict[str, Digest], increments: int) -> dict[str, Digest]:
        self._tables.snapshot = None
        self._chain = Chain(folder, files, increments)
        return files

    def _write_all(self, folder: Path, snapshot: RowSnapshot, metadata: dict[str, str]) -> dict[str, Digest]:
        store, columns = self._store, self._tables.columns()
        row_bytes = sum(tensor[:1].nbytes for tensor in columns.values())
        step, piece = max(1, _FILE_BYTES // row_bytes), max(1, _PIECE_BYTES // row_bytes)
        files: dict[str, Digest] = {}
        for begin in range(0, store.num_rows, step):
            end = min(begin + step, store.num_rows)
            parts = [snapshot.take(min(place + piece, end)) for place in range(begin, end, piece)]
            values = {name: torch.cat([part[name] for part in parts]) for name in columns}
            own = metadata | {"start": str(store.start + begin), "stop": str(store.start + end)}
            files |= write_rows(folder, f"rows-{store.start + begin:012d}-{store.start + end:012d}", values, own)
        return files

    def _write_changed(
        self, folder: Path, chain: Chain, values: dict[str, Tensor], metadata: dict[str, str]
    ) -> dict[str, Digest]:
        (folder / FOLDER).mkdir(exist_ok=True)
        for name in chain.files:
            os.link(chain.folder / name, folder / name)
        number, store = chain.increments + 1, self._store
        name = f"changed-{number:04d}-{store.start:012d}-{store.stop:012d}"
        return chain.files | write_rows(folder, name, values, metadata)

    def published(self, folder: Path) -> None:
        """The save's folder has got its final name, by which the next increment finds the files to link."""
        if self._chain is not None:
            self._chain = Chain(folder, self._chain.files, self._chain.increments)


def _rows_to_host(column: Tensor, rows: Tensor) -> Tensor:
    """column[rows] in host memory; rows [c] int64. On the device only a piece of it exists at a time."""
    result = torch.empty(rows.numel(), *column.shape[1:], dtype=column.dtype)
    step = max(1, _PIECE_BYTES // column[:1].nbytes)
    for begin in range(0, rows.numel(), step):
        result[begin : begin + step] = column[rows[begin : begin + step]]
    return result


def write_rows(folder: Path, stem: str, values: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Digest]:
    """Write one file of rows below `folder` and sync it; its name with its digest."""
    (folder / FOLDER).mkdir(exist_ok=True)
    name = f"{FOLDER}/{stem}.safetensors"
    values = {**values, "touched": values["touched"] > 0}  # in memory it is more than yes or no
    save_tensors(values, folder / name, metadata)
    return {name: file_digest(folder / name)}


def table_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's tables in the order in which they apply: full ones, then increments as they were made."""
    return [
        *sorted((folder / FOLDER).glob("rows-*.safetensors")),
        *sorted((folder / FOLDER).glob("changed-*.safetensors")),
    ]


def load_tables(folder: Path, tables: ShardedTables) -> None:
    """Fill this rank's rows and their optimizer's state from whichever files hold them.

    Raises CheckpointError where rows are missing or of another width, the optimizer's state is another one, or a file is
    damaged.
    """
    tables.optimizer.steps = _fill(folder, tables.store, tables.columns())


def load_rows(folder: Path, store: RowStore) -> None:
    """Fill a store with the values of its rows alone; none counts as touched. Raises as `load_tables`."""
    columns = store.columns()
    del columns["touched"]
    _fill(folder, store, columns)


def _fill(folder: Path, store: RowStore, columns: dict[str, Tensor]) -> int:
    """Fill columns of a store's rows, in place, from all files that overlap it; the optimizer's steps of the last of them."""
    filled = steps = 0
    for path, file, begin, end in _overlapping(folder, store.start, store.stop):
        _check_columns(path, file, columns)
        if path.name.startswith("rows-"):
            start = int(file.metadata()["start"])
            for key, target in columns.items():
                target[begin - store.start : end - store.start].copy_(file.get_slice(key)[begin - start : end - start])
            filled += end - begin
        else:
            rows = file.get_tensor("rows")
            ours = ((rows >= store.start) & (rows < store.stop)).nonzero().squeeze(1)
            place = (rows[ours] - store.start).to(store.device)
            for key, target in columns.items():
                target[place] = file.get_tensor(key)[ours].to(target.device, target.dtype)
        steps = int(file.metadata()["steps"])
    if filled != store.num_rows:
        raise CheckpointError(
            f"{folder / FOLDER}: holds {filled} of the rows {store.start} to {store.stop}; the "
            "checkpoint is of a model with other tables, or damaged"
        )
    return steps


def _overlapping(folder: Path, start: int, stop: int) -> Iterator[tuple[Path, Any, int, int]]:
    """(path, open file, begin, end) of the files that hold rows of [start, stop), in order."""
    for path in table_files(folder):
        with open_tensors(path) as file:
            metadata = file.metadata()
            begin, end = max(int(metadata["start"]), start), min(int(metadata["stop"]), stop)
            if begin < end:
                yield path, file, begin, end


def _check_columns(path: Path, file: Any, columns: dict[str, Tensor]) -> None:
    missing = sorted(columns.keys() - set(file.keys()))
    if missing:
        raise CheckpointError(
            f"{path}: holds no {missing[0]}; over_encoding.optimizer differs from the run that wrote it"
        )
    for key, target in columns.items():
        shape = file.get_slice(key).get_shape()
        if shape[1:] != list(target.shape[1:]):
            raise CheckpointError(
                f"{path}: {key} has rows of shape {shape[1:]}, this model needs {list(target.shape[1:])}"
            )


def merged_rows(folder: Path) -> Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]:
    """The arguments of write_rows for a checkpoint's full files with all increments applied, one after the other."""
    full = sorted((folder / FOLDER).glob("rows-*.safetensors"))
    for path in full:
        with open_tensors(path) as file:
            metadata = file.metadata()
            values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        start, stop = int(metadata["start"]), int(metadata["stop"])
        for other, changed, _, _ in _overlapping(folder, start, stop):
            if other.name.startswith("changed-"):
                rows = changed.get_tensor("rows")
                ours = ((rows >= start) & (rows < stop)).nonzero().squeeze(1)
                for key, target in values.items():
                    target[rows[ours] - start] = changed.get_tensor(key)[ours]
                metadata["steps"] = changed.metadata()["steps"]
        yield path.stem, values, metadata
