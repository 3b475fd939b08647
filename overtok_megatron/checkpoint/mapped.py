"""Rows read from a checkpoint's files as they are asked for: memory that does not depend on the size of the tables.

Reads by position and not through mapped pages: those would count as this process's memory for as long as it runs. Which
rows are in memory is left to the system's page cache.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.checkpoint.tables import FOLDER, table_files
from overtok_megatron.errors import CheckpointError
from overtok_megatron.kernels.rows import RowKernels, TableRows

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}


class _Column:
    """One tensor of a safetensors file, read a row at a time. Format: header length (u64), a JSON header, the data."""

    def __init__(self, handle: int, data: int, entry: dict[str, Any]) -> None:
        self.dtype = _DTYPES[entry["dtype"]]
        self.shape = entry["shape"][1:]
        self._handle = handle
        self._begin = data + entry["data_offsets"][0]
        self._row_bytes = self.dtype.itemsize * (self.shape[0] if self.shape else 1)

    def read(self, index: list[int]) -> Tensor:
        """Rows [r, *shape]."""
        size = self._row_bytes
        parts = [os.pread(self._handle, size, self._begin + size * row) for row in index]
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=self.dtype).view(len(index), *self.shape)


class MappedRows:
    """All rows of a checkpoint, read-only, on disk. `read` gives what a shard in memory would."""

    rows: TableRows | None = None
    device = torch.device("cpu")

    def __init__(self, folder: Path, total_rows: int, width: int, kernels: RowKernels) -> None:
        """Raises CheckpointError where rows are missing or of another width, or the checkpoint has increments."""
        self.start, self.stop = 0, total_rows
        self.kernels = kernels
        self._starts: list[int] = []
        self._weights: list[_Column] = []
        self._scales: list[_Column | None] = []
        end = 0
        for path in table_files(folder):
            if not path.name.startswith("rows-"):
                raise CheckpointError(
                    f"{path}: an incremental save, which cannot be read in place; write the checkpoint anew with "
                    f"`overtok checkpoint reshape {folder}`, or leave the tables in memory"
                )
            begin, end = self._open(path, end, width)
            self._starts.append(begin)
        if end != total_rows:
            raise CheckpointError(f"{folder / FOLDER}: holds {end} of {total_rows} rows; of another model, or damaged")

    def _open(self, path: Path, expected: int, width: int) -> tuple[int, int]:
        handle = os.open(path, os.O_RDONLY)  # for as long as the process lives
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            (length,) = struct.unpack("<Q", os.pread(handle, 8, 0))
            header = json.loads(os.pread(handle, length, 8))
            begin, end = (int(header["__metadata__"][key]) for key in ("start", "stop"))
            self._weights.append(_Column(handle, 8 + length, header["weight"]))
            self._scales.append(_Column(handle, 8 + length, header["scale"]) if "scale" in header else None)
        except (OSError, ValueError, LookupError, struct.error) as error:
            raise CheckpointError(f"{path}: unreadable ({error})") from None
        if begin != expected or self._weights[-1].shape != [width]:
            raise CheckpointError(
                f"{path}: rows from {begin} of width {self._weights[-1].shape[0]}; expected from {expected} of width {width}"
            )
        return begin, end

    def read(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        edges = torch.searchsorted(index, torch.tensor([*self._starts, self.stop])).tolist()
        parts = [torch.empty(0, self._weights[0].shape[0], dtype=dtype)] if self._weights else []
        for number, start in enumerate(self._starts):
            first, last = edges[number], edges[number + 1]
            if first == last:
                continue
            own = (index[first:last] - start).tolist()
            scale = self._scales[number]
            stored = TableRows(self._weights[number].read(own), None if scale is None else scale.read(own))
            parts.append(self.kernels.fetch(stored, torch.arange(len(own)), dtype))
        return torch.cat(parts)
