"""PREFIX.idx, Megatron's index of PREFIX.bin: read memory-mapped, written as a stream.

The 9 bytes `MMIDIDX\\0\\0`, int64 version 1, uint8 dtype code, int64 sequences, int64 documents + 1, then int32 lengths
[sequences], int64 byte offsets [sequences], int64 document starts [documents + 1], counted in sequences; little-endian.
Format: Megatron-LM, megatron/core/datasets/indexed_dataset.py. Not here: its float dtypes, which do not hold tokens, and the
modes of multimodal sets.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from overtok_megatron.errors import DataError

MEND = "prepare it again with `overtok prepare`"
DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_STRIDE = 1 << 20  # entries handled at once


def dtype_code(vocab_size: int) -> int:
    """The code of the dtype in which tokens are stored; Megatron chooses the same for such a vocabulary."""
    return 8 if vocab_size < 65500 else 4


@dataclass(frozen=True)
class Index:
    """lengths int32 [sequences] in tokens, offsets int64 [sequences] in bytes, starts int64 [documents + 1] in sequences."""

    dtype: type[np.generic]
    lengths: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, [documents]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(ends[self.starts])


def read_index(path: Path) -> Index:
    """Map an index. Raises DataError where the file is foreign, or not as long as its header says."""
    begin = len(_MAGIC) + _HEADER.size
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(begin)
    if len(header) < begin or not header.startswith(_MAGIC):
        raise DataError(f"{path}: not an indexed dataset's index ({size} bytes, its first ones are wrong); {MEND}")
    version, code, sequences, starts = _HEADER.unpack_from(header, len(_MAGIC))
    if version != 1 or code not in DTYPES:
        raise DataError(
            f"{path}: version {version} with dtype code {code}; read are version 1 with codes {sorted(DTYPES)}; {MEND}"
        )
    expected = begin + sequences * 12 + starts * 8
    if size != expected:
        raise DataError(f"{path}: {size} bytes, its header speaks of {expected}; {MEND}")
    if starts == 0:
        raise DataError(f"{path}: has no start of a document, not even the first; {MEND}")

    def part(dtype: type[np.generic], count: int, offset: int) -> np.ndarray:
        if count == 0:
            return np.zeros(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,), offset=offset)

    return Index(
        DTYPES[code],
        part(np.int32, sequences, begin),
        part(np.int64, sequences, begin + sequences * 4),
        part(np.int64, starts, begin + sequences * 12),
    )


def check_index(index: Index, path: Path) -> None:
    """Raise DataError unless sequences follow each other in PREFIX.bin without a gap and documents cover them in order."""
    size, expected = np.dtype(index.dtype).itemsize, 0
    for begin in range(0, len(index.lengths), _STRIDE):
        ends = np.cumsum(index.lengths[begin : begin + _STRIDE], dtype=np.int64) * size + expected
        wanted = np.concatenate([[expected], ends[:-1]])
        wrong = np.flatnonzero(index.offsets[begin : begin + _STRIDE] != wanted)
        if len(wrong):
            where = begin + int(wrong[0])
            raise DataError(
                f"{path}: sequence {where} begins at byte {index.offsets[where]}, not at {wanted[wrong[0]]} where the "
                "one before it ends; write the set anew in order"
            )
        expected = int(ends[-1])
    starts = index.starts
    if starts[0] != 0 or starts[-1] != len(index.lengths) or (np.diff(starts) < 0).any():
        raise DataError(
            f"{path}: its documents begin at sequence {starts[0]} and end at {starts[-1]} of {len(index.lengths)}, or not "
            "in order; end every document with the builder's end_document"
        )


def write_index(write: Callable[[bytes], object], code: int, lengths: Path, sequences: int) -> None:
    """Hand an index to `write`, one sequence per document, in constant memory. lengths: file of int32 [sequences]."""
    stored = np.memmap(lengths, dtype=np.int32, mode="r", shape=(sequences,)) if sequences else np.zeros(0, np.int32)
    write(_MAGIC + _HEADER.pack(1, code, sequences, sequences + 1))
    for begin in range(0, sequences, _STRIDE):
        write(stored[begin : begin + _STRIDE].tobytes())
    size, end = np.dtype(DTYPES[code]).itemsize, 0
    for begin in range(0, sequences, _STRIDE):
        ends = np.cumsum(stored[begin : begin + _STRIDE], dtype=np.int64) * size + end
        write(np.concatenate([[end], ends[:-1]]).astype(np.int64).tobytes())
        end = int(ends[-1])
    for begin in range(0, sequences + 1, _STRIDE):
        write(np.arange(begin, min(begin + _STRIDE, sequences + 1), dtype=np.int64).tobytes())
