"""Table rows as safetensors files by global row range: written by any number of ranks, read by any other number.

A full file holds all rows of its range: `weight`, `touched` and every state of the row optimizer. An incremental file holds,
beside the row ids in `rows`, only those rows of its range that changed since the save before. A checkpoint has all files that
it needs: an incremental save hard-links the files that it does not write again, so that the older checkpoint can be removed.
The names of the files: table_file.py. Metadata: the range and the optimizer's step count; the last file's count holds.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from overtok_megatron.checkpoint.dense import open_tensors
from overtok_megatron.checkpoint.store import Digest, file_digest
from overtok_megatron.checkpoint.table_file import FOLDER, TableFile
from overtok_megatron.checkpoint.writing import FILE_BYTES, save_tensors
from overtok_megatron.errors import CheckpointError
from overtok_megatron.ngram.row_store import RowStore
from overtok_megatron.ngram.sharded_tables import ShardedTables
from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.parallel.copy_stream import CopyStream


@dataclass(frozen=True)
class Chain:
    """The files that hold a rank's rows after a save: full ones and the increments on them, by name with their digests."""

    folder: Path
    files: dict[str, Digest]
    increments: int


class TableWriter:
    """Saves one rank's rows, all of them or only those that changed, in two halves.

    `start_save` notes what is to be written, and copies no rows. A full save takes no time there that grows with the tables;
    one of changed rows finds them, for which it reads one flag per row and waits for the device. The function that it
    returns writes the files, on any one thread, while training goes on changing rows (ngram/snapshot.py).
    """

    def __init__(self, tables: ShardedTables, max_increments: int) -> None:
        """max_increments: how many incremental saves may build on a full one."""
        self._tables = tables
        self._store = tables.store
        self._optimizer = tables.optimizer
        self._max_increments = max_increments
        self._chain: Chain | None = None
        self._stream = CopyStream(tables.store.device)

    def forget(self) -> None:
        """Make the next save a full one: the last was not completed, so it is not known what has changed since."""
        self._chain = None

    def bytes_of_next_save(self) -> int:
        """How many bytes of rows the next save writes, if it is a full one; 0 for one of changed rows."""
        if self._next_is_incremental:
            return 0
        columns = {**self._store.columns(), **self._optimizer.state}
        return sum(column.nbytes for column in columns.values())

    @property
    def _next_is_incremental(self) -> bool:
        return self._chain is not None and self._chain.increments < self._max_increments

    def start_save(self, folder: Path) -> Callable[[], dict[str, Digest]]:
        """Start a save below `folder`; call the returned function once to write the files: it returns their digests."""
        self._tables.settle()
        store = self._store
        incremental = self._next_is_incremental
        chain, self._chain = self._chain, None
        changed = None
        if not incremental:
            store.forget_changed()
        else:
            changed = store.take_changed()
            if 2 * changed.shape[0] > store.num_rows:
                changed = None
        if store.num_rows == 0:
            return dict
        snapshot = self._tables.snapshot = RowSnapshot(self._tables.columns(), self._stream, changed)
        return partial(self._write, folder, snapshot, None if changed is None else chain, self._optimizer.steps)

    def _write(self, folder: Path, snapshot: RowSnapshot, chain: Chain | None, steps: int) -> dict[str, Digest]:
        """Write the snapshot. chain: what the save of changed rows builds on; None = all rows are written."""
        try:
            if chain is None:
                files = self._write_all(folder, snapshot, steps)
            else:
                files = self._write_changed(folder, chain, snapshot, steps)
        finally:
            self._tables.snapshot = None  # else rows would be preserved on and on
        self._chain = Chain(folder, files, 0 if chain is None else chain.increments + 1)
        return files

    def _write_all(self, folder: Path, snapshot: RowSnapshot, steps: int) -> dict[str, Digest]:
        store = self._store
        rows_per_file = max(1, FILE_BYTES // snapshot.row_bytes)
        files: dict[str, Digest] = {}
        for first in range(0, store.num_rows, rows_per_file):
            stop = min(first + rows_per_file, store.num_rows)
            file = TableFile.full(store.start + first, store.start + stop)
            files |= write_rows(folder, file, snapshot.take(stop), steps)
        return files

    def _write_changed(self, folder: Path, chain: Chain, snapshot: RowSnapshot, steps: int) -> dict[str, Digest]:
        (folder / FOLDER).mkdir(exist_ok=True)
        for name in chain.files:
            os.link(chain.folder / name, folder / name)
        file = TableFile(chain.increments + 1, self._store.start, self._store.stop)
        values = snapshot.take(snapshot.count)
        assert snapshot.host_rows is not None
        values["rows"] = snapshot.host_rows + self._store.start
        return chain.files | write_rows(folder, file, values, steps)

    def published(self, folder: Path) -> None:
        """Note the final name of the save's folder, below which the next increment finds the files to link."""
        if self._chain is not None:
            self._chain = Chain(folder, self._chain.files, self._chain.increments)


def write_rows(folder: Path, file: TableFile, values: dict[str, Tensor], steps: int) -> dict[str, Digest]:
    """Write a table file of the checkpoint `folder` and sync it; returns its name with its digest.

    values: columns [r, ...] by name. steps: how many steps the row optimizer has taken.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    values = {**values, "touched": values["touched"] > 0}  # in memory the flag has more than two values
    metadata = {"start": str(file.start), "stop": str(file.stop), "steps": str(steps)}
    save_tensors(values, folder / file.name, metadata)
    return {file.name: file_digest(folder / file.name)}


def table_files(folder: Path) -> list[TableFile]:
    """The table files of a checkpoint in the order in which they apply: full ones, then increments as they were made."""
    names = [path.relative_to(folder).as_posix() for path in (folder / FOLDER).glob("*")]
    return sorted(file for name in names if (file := TableFile.parse(name)) is not None)


def load_tables(folder: Path, tables: ShardedTables) -> None:
    """Fill this rank's rows and the state of their optimizer from whichever files hold them.

    Raises CheckpointError where rows are missing or of another width, where the state is another optimizer's, or where a file
    is damaged.
    """
    assert not tables.any_announced, "the rows of an announced step may have been read already"
    tables.optimizer.steps = _fill(folder, tables.store, tables.columns())


def load_rows(folder: Path, store: RowStore) -> None:
    """Fill a store with the values of its rows alone; none counts as touched. Raises as `load_tables` does."""
    columns = store.columns()
    del columns["touched"]
    _fill(folder, store, columns)


def _fill(folder: Path, store: RowStore, columns: dict[str, Tensor]) -> int:
    """Fill columns of a store's rows, in place, from all files that overlap it; returns the last file's step count."""
    filled = steps = 0
    for file, contents, file_steps in _overlapping(folder, store.start, store.stop):
        _check_columns(folder / file.name, contents, columns)
        first, stop = max(file.start, store.start), min(file.stop, store.stop)
        if file.is_full:
            for key, target in columns.items():
                values = contents.get_slice(key)[first - file.start : stop - file.start]
                target[first - store.start : stop - store.start].copy_(values)
            filled += stop - first
        else:
            local_rows, kept = _changed_rows(contents, store.start, store.stop)
            local_rows = local_rows.to(store.device)
            for key, target in columns.items():
                target[local_rows] = contents.get_tensor(key)[kept].to(target.device, target.dtype)
        steps = file_steps
    if filled != store.num_rows:
        raise CheckpointError(
            f"{folder / FOLDER}: holds {filled} of the rows {store.start} to {store.stop}; the "
            "checkpoint is of a model with other tables, or damaged"
        )
    return steps


def _overlapping(folder: Path, start: int, stop: int) -> Iterator[tuple[TableFile, Any, int]]:
    """(file, its open contents, its step count) of the files with rows of [start, stop), in the order in which they apply."""
    for file in table_files(folder):
        if max(file.start, start) < min(file.stop, stop):
            with open_tensors(folder / file.name) as contents:
                yield file, contents, int(contents.metadata()["steps"])


def _changed_rows(contents: Any, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(rows less `start`, their indices in the file), int64, of an incremental file's rows that lie in [start, stop)."""
    row_ids = contents.get_tensor("rows")
    kept = ((row_ids >= start) & (row_ids < stop)).nonzero().squeeze(1)
    return row_ids[kept] - start, kept


def _check_columns(path: Path, contents: Any, columns: dict[str, Tensor]) -> None:
    missing = sorted(columns.keys() - set(contents.keys()))
    if missing:
        raise CheckpointError(
            f"{path}: holds no {missing[0]}; over_encoding.optimizer differs from the run that wrote it"
        )
    for key, target in columns.items():
        shape = contents.get_slice(key).get_shape()
        if shape[1:] != list(target.shape[1:]):
            raise CheckpointError(
                f"{path}: {key} has rows of shape {shape[1:]}, this model needs {list(target.shape[1:])}"
            )


def merged_rows(folder: Path) -> Iterator[tuple[TableFile, dict[str, Tensor], int]]:
    """The arguments of `write_rows` for the full files of a checkpoint with all increments applied, one after the other."""
    for full in table_files(folder):
        if not full.is_full:
            continue
        with open_tensors(folder / full.name) as contents:
            steps = int(contents.metadata()["steps"])
            values = {key: contents.get_tensor(key) for key in contents.keys()}  # noqa: SIM118  # not a mapping
        for file, contents, file_steps in _overlapping(folder, full.start, full.stop):
            if file.is_full:
                continue
            local_rows, kept = _changed_rows(contents, full.start, full.stop)
            for key, target in values.items():
                target[local_rows] = contents.get_tensor(key)[kept]
            steps = file_steps
        yield full, values, steps
