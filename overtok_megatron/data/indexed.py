"""The dataset on disk: Megatron's indexed format, PREFIX.bin (tokens) and PREFIX.idx, with a manifest PREFIX.json.

Read as one stream of tokens, documents in file order. `overtok prepare` writes one sequence per document, ended by the
end-of-document token; sets that Megatron wrote, with any number of sequences per document, are read once `overtok adopt`
has given them a manifest, which is written last: without it a dataset does not exist. index_file.py reads and writes the
index; partial_set.py writes sets such that a kill loses nothing. Not here: blends of datasets.
"""

import hashlib
import os
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from overtok_megatron.data.index_file import MEND, read_index
from overtok_megatron.data.manifest import DatasetManifest, dataset_paths, read_manifest
from overtok_megatron.data.partial_set import PartialSet
from overtok_megatron.errors import DataError

_LONGEST_DOCUMENT = 2**31 - 1  # the index stores lengths as int32


class IndexedWriter:
    """Writes documents one by one, in constant memory; the set is visible only once `finish` has returned.

    Use as a context manager: leaving it without `finish` removes what was written.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, eod_id: int, tokenizer_fingerprint: str) -> None:
        self._set = PartialSet(prefix, vocab_size, eod_id, tokenizer_fingerprint)
        self._publishing = False
        self._set.open()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set.discard(published=self._publishing)

    def add(self, tokens: list[int], source_bytes: int) -> None:
        """Append one document, its end-of-document token included."""
        check_length(len(tokens), f"{self._set.paths[0]}: document {self._set.counts.documents}")
        data = np.asarray(tokens, dtype=self._set.dtype).tobytes()
        self._set.append(data, np.int32(len(tokens)).tobytes(), source_bytes)

    def finish(self) -> DatasetManifest:
        """Sync, write the index, and make the dataset visible: tokens first, manifest last."""
        manifest = self._set.seal()
        self._publishing = True
        self._set.publish()
        self._publishing = False
        return manifest


def check_length(tokens: int, document: str) -> None:
    """Raise DataError where a document is longer than the format can store. document: how the error calls it."""
    if tokens > _LONGEST_DOCUMENT:
        raise DataError(f"{document} has {tokens} tokens, the format holds {_LONGEST_DOCUMENT}; split it")


class IndexedDataset:
    """A dataset, read as one stream of tokens.

    Tokens are read by positional reads of a file that stays open, from any number of threads, and not through a memory map:
    where the file has become shorter since it was opened, or its disk fails, a map would end the process by SIGBUS.
    Raises DataError on opening where a file is missing, foreign, or not as long as the others say.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._paths = dataset_paths(prefix)
        for path in self._paths:
            if not path.is_file():
                also = ", describe Megatron's files with `overtok adopt`" if path == self._paths[2] else ""
                raise DataError(f"{path}: no such file; {MEND}{also}, or correct the path in the data section")
        try:
            self.manifest = read_manifest(self._paths[2])
            self.index = read_index(self._paths[1])
            tokens = self.index.num_tokens
            check_bin(self._paths[0], tokens, self.index.dtype)
            for what, counted, indexed in (
                ("tokens", self.manifest.num_tokens, tokens),
                ("documents", self.manifest.num_documents, self.index.num_documents),
            ):
                if counted != indexed:
                    raise DataError(f"{self._paths[2]}: counts {counted} {what}, the index {indexed}; {MEND}")
            self._file = self._paths[0].open("rb", buffering=0)
        except OSError as error:
            raise DataError(
                f"{error.filename or prefix}: cannot be read ({error.strerror or error}); ask its owner for access"
            ) from None

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, computed anew at every call: [documents]."""
        return self.index.document_lengths()

    def tokens(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """`count` tokens of the stream from `start` on, int64. Raises DataError where the file no longer holds them."""
        assert start >= 0 and start + count <= self.num_tokens
        stored = np.empty(count, dtype=self.index.dtype)
        size = stored.itemsize
        remaining, offset = stored.view(np.uint8).data, start * size
        while remaining:
            try:
                read = os.preadv(self._file.fileno(), [remaining], offset)
            except OSError as error:
                raise DataError(
                    f"{self._paths[0]}: cannot be read at byte {offset} ({error.strerror}); check its disk, then start again"
                ) from None
            if read == 0:
                raise DataError(
                    f"{self._paths[0]}: ends at byte {offset} or before, its index speaks of {self.num_tokens * size}: it was "
                    "cut while it was read; put the file back, or prepare the set again, then start again"
                )
            remaining, offset = remaining[read:], offset + read
        return stored.astype(np.int64)

    def verify(self) -> None:
        """Hash both files again. Raises DataError naming the one that changed since it was written."""
        for path, expected in zip(self._paths, [self.manifest.bin_sha256, self.manifest.idx_sha256], strict=False):
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise DataError(f"{path}: SHA-256 differs from {self._paths[2].name}; {MEND}")


def check_bin(path: Path, tokens: int, dtype: type[np.generic]) -> None:
    """Raise DataError unless a token file is as long as its index says."""
    size, expected = path.stat().st_size, tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise DataError(f"{path}: {size} bytes, its index speaks of {expected}; {MEND}")


def map_tokens(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """A token file, memory-mapped: [tokens] of `dtype`."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
