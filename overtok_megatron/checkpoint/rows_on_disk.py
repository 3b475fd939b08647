"""Rows read from a checkpoint's files as they are asked for: memory does not depend on the size of the tables.

Rows are read with pread and not through memory-mapped pages: those would count as memory of this process for as long as it
runs. Which rows stay in memory is left to the system's page cache.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.checkpoint.table_file import FOLDER, TableFile
from overtok_megatron.checkpoint.tables import table_files
from overtok_megatron.errors import CheckpointError
from overtok_megatron.kernels.rows import RowKernels, StoredRows

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}


class _Column:
    """One tensor of a safetensors file, read row by row. Format: header length (u64), a JSON header, the data."""

    def __init__(self, handle: int, data_start: int, entry: dict[str, Any]) -> None:
        """data_start: the offset in the file at which the data of all tensors starts. entry: of the header."""
        self.dtype = _DTYPES[entry["dtype"]]
        self.row_shape = entry["shape"][1:]
        self._handle = handle
        self._start = data_start + entry["data_offsets"][0]
        self._row_bytes = self.dtype.itemsize * (self.row_shape[0] if self.row_shape else 1)

    def read(self, rows: list[int]) -> Tensor:
        """The rows of the file at these indices, [r, *row_shape]."""
        size = self._row_bytes
        parts = [os.pread(self._handle, size, self._start + size * row) for row in rows]
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=self.dtype).view(len(rows), *self.row_shape)


class RowsOnDisk:
    """All rows of a checkpoint, read-only, on disk (storage "mapped"). `read` returns what a `RowStore` in memory returns."""

    rows: StoredRows | None = None
    device = torch.device("cpu")

    def __init__(self, folder: Path, total_rows: int, width: int, kernels: RowKernels) -> None:
        """Raises CheckpointError where rows are missing or of another width, or the checkpoint has increments."""
        self.start, self.stop = 0, total_rows
        self.kernels = kernels
        self._starts: list[int] = []
        self._weights: list[_Column] = []
        self._scales: list[_Column | None] = []
        end = 0
        for file in table_files(folder):
            if not file.is_full:
                raise CheckpointError(
                    f"{folder / file.name}: an incremental save, which cannot be read in place; write the checkpoint anew with "
                    f"`overtok checkpoint reshape {folder}`, or leave the tables in memory"
                )
            self._open(folder, file, end, width)
            end = file.stop
        if end != total_rows:
            raise CheckpointError(f"{folder / FOLDER}: holds {end} of {total_rows} rows; of another model, or damaged")

    def _open(self, folder: Path, file: TableFile, expected_start: int, width: int) -> None:
        path = folder / file.name
        handle = os.open(path, os.O_RDONLY)  # for as long as the process lives
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            (length,) = struct.unpack("<Q", os.pread(handle, 8, 0))
            header = json.loads(os.pread(handle, length, 8))
            weight = _Column(handle, 8 + length, header["weight"])
            scale = _Column(handle, 8 + length, header["scale"]) if "scale" in header else None
        except (OSError, ValueError, LookupError, struct.error) as error:
            raise CheckpointError(f"{path}: unreadable ({error})") from None
        if file.start != expected_start or weight.row_shape != [width]:
            found = f"{path}: rows from {file.start} of width {weight.row_shape[0]}"
            raise CheckpointError(f"{found}; expected from {expected_start} of width {width}")
        self._starts.append(file.start)
        self._weights.append(weight)
        self._scales.append(scale)

    def read(self, row_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of row_ids [r] int64, ascending -> [r, w] of a dtype."""
        edges = torch.searchsorted(row_ids, torch.tensor([*self._starts, self.stop])).tolist()
        parts = [torch.empty(0, self._weights[0].row_shape[0], dtype=dtype)] if self._weights else []
        for number, start in enumerate(self._starts):
            first, last = edges[number], edges[number + 1]
            if first == last:
                continue
            file_rows = (row_ids[first:last] - start).tolist()
            scale = self._scales[number]
            stored = StoredRows(self._weights[number].read(file_rows), None if scale is None else scale.read(file_rows))
            parts.append(self.kernels.read(stored, torch.arange(len(file_rows)), dtype))
        return torch.cat(parts)
