"""The dataset on disk: Megatron's indexed format, PREFIX.bin (tokens) and PREFIX.idx, with a manifest PREFIX.json.

PREFIX.idx: the 9 bytes `MMIDIDX\\0\\0`, int64 version 1, uint8 dtype code, int64 sequences, int64 documents + 1, then
int32 lengths [sequences], int64 byte offsets [sequences], int64 document starts [documents + 1]; little-endian.
Format: Megatron-LM, megatron/core/datasets/indexed_dataset.py. Here every document is one sequence and ends with its
end-of-document token; files with several sequences a document are refused. The manifest is written last: without it a
dataset is not there. Not here: blends of datasets, and reading without a manifest.
"""

import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from overtok_megatron.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_CODES: dict[int, type[np.generic]] = {4: np.int32, 8: np.uint16}
_HEADER = struct.Struct("<QBQQ")
_LONGEST_DOCUMENT = 2**31 - 1  # the index stores lengths as int32
_MEND = "prepare it again with `overtok prepare`"


@dataclass(frozen=True)
class DatasetManifest:
    """Counts and identity of a dataset; sizes in bytes, digests SHA-256."""

    vocab_size: int
    eod_id: int
    tokenizer_fingerprint: str
    num_documents: int
    num_tokens: int
    source_bytes: int
    bin_sha256: str
    idx_sha256: str


def dataset_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """(tokens, index, manifest) of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


class IndexedWriter:
    """Writes documents one by one, in constant memory for the tokens; visible only once `finish` returned.

    Use as a context manager: leaving it without `finish` removes what was written.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, eod_id: int, tokenizer_fingerprint: str) -> None:
        self._paths = dataset_paths(prefix)
        self._aside = [path.with_name(path.name + ".partial") for path in self._paths]
        self._publishing = False
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        self._code = 8 if vocab_size < 65500 else 4
        self._identity = (vocab_size, eod_id, tokenizer_fingerprint)
        self._lengths: list[int] = []
        self._digest = hashlib.sha256()
        self._source_bytes = 0
        self._file: BinaryIO = self._aside[0].open("wb")

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # on a full disk this fails once more
        finally:
            self._remove()

    def _remove(self) -> None:
        """What was written aside, and what was renamed where the renaming itself broke off."""
        for path in [*self._aside, *(self._paths if self._publishing else [])]:
            path.unlink(missing_ok=True)

    def add(self, tokens: list[int], source_bytes: int) -> None:
        """Append one document, its end-of-document token included."""
        if len(tokens) > _LONGEST_DOCUMENT:
            raise DataError(
                f"{self._paths[0]}: document {len(self._lengths)} has {len(tokens)} tokens, the format holds "
                f"{_LONGEST_DOCUMENT}; split it"
            )
        data = np.asarray(tokens, dtype=_CODES[self._code]).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(len(tokens))
        self._source_bytes += source_bytes

    def finish(self) -> DatasetManifest:
        """Sync, write the index, and make the dataset visible: tokens first, manifest last."""
        vocab_size, eod_id, fingerprint = self._identity
        index = self._index_bytes()
        manifest = DatasetManifest(
            vocab_size=vocab_size,
            eod_id=eod_id,
            tokenizer_fingerprint=fingerprint,
            num_documents=len(self._lengths),
            num_tokens=sum(self._lengths),
            source_bytes=self._source_bytes,
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )
        self._sync_and_close(self._file)
        for path, content in zip(
            self._aside[1:], [index, json.dumps(asdict(manifest), indent=1).encode()], strict=True
        ):
            with path.open("wb") as file:
                file.write(content)
                self._sync_and_close(file)
        self._publishing = True
        self._paths[2].unlink(missing_ok=True)  # an old dataset of this name stops being one before its parts change
        for aside, path in zip(self._aside, self._paths, strict=True):
            os.replace(aside, path)
        self._publishing = False
        self._sync_folder()
        return manifest

    def _index_bytes(self) -> bytes:
        lengths = np.asarray(self._lengths, dtype=np.int32)
        size = np.dtype(_CODES[self._code]).itemsize
        offsets = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * size, out=offsets[1:])
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        header = _MAGIC + _HEADER.pack(1, self._code, len(lengths), len(documents))
        return header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()

    def _sync_folder(self) -> None:
        """The names, too, outlive a power cut."""
        folder = os.open(self._paths[0].parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @staticmethod
    def _sync_and_close(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()


class IndexedDataset:
    """A memory-mapped dataset, read as one stream of tokens, documents in file order.

    Raises DataError on opening where a file is missing, foreign, or not as long as the others say.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._paths = dataset_paths(prefix)
        for path in self._paths:
            if not path.is_file():
                raise DataError(f"{path}: no such file; {_MEND}, or correct the path in the data section")
        self.manifest = _read_manifest(self._paths[2])
        self.document_lengths, dtype = self._read_index(self._paths[1])
        tokens = int(self.document_lengths.sum(dtype=np.int64))
        expected = tokens * np.dtype(dtype).itemsize
        size = self._paths[0].stat().st_size
        if size != expected:
            raise DataError(f"{self._paths[0]}: {size} bytes, its index speaks of {expected}; {_MEND}")
        for what, counted, indexed in (
            ("tokens", self.manifest.num_tokens, tokens),
            ("documents", self.manifest.num_documents, len(self.document_lengths)),
        ):
            if counted != indexed:
                raise DataError(f"{self._paths[2]}: counts {counted} {what}, the index {indexed}; {_MEND}")
        self._tokens = np.memmap(self._paths[0], dtype=dtype, mode="r") if size else np.zeros(0, dtype=dtype)

    @staticmethod
    def _read_index(path: Path) -> tuple[npt.NDArray[np.int32], type[np.generic]]:
        begin = len(_MAGIC) + _HEADER.size
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(begin)
        if len(header) < begin or not header.startswith(_MAGIC):
            raise DataError(f"{path}: not an indexed dataset's index ({size} bytes, its first ones are wrong); {_MEND}")
        version, code, sequences, documents = _HEADER.unpack_from(header, len(_MAGIC))
        if version != 1 or code not in _CODES:
            raise DataError(
                f"{path}: version {version} with dtype code {code}; read are version 1 with codes "
                f"{sorted(_CODES)}; {_MEND}"
            )
        expected = begin + sequences * 12 + documents * 8
        if size != expected:
            raise DataError(f"{path}: {size} bytes, its header speaks of {expected}; {_MEND}")
        if documents != sequences + 1:
            raise DataError(
                f"{path}: {sequences} sequences in {documents - 1} documents; read is one sequence a document; {_MEND}"
            )
        if sequences == 0:
            return np.zeros(0, dtype=np.int32), _CODES[code]
        return np.memmap(path, dtype=np.int32, mode="r", shape=(sequences,), offset=begin), _CODES[code]

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    def tokens(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """`count` tokens of the stream from `start` on, int64."""
        assert start >= 0 and start + count <= self.num_tokens
        return self._tokens[start : start + count].astype(np.int64)

    def verify(self) -> None:
        """Hash both files again. Raises DataError naming the one that changed since it was written."""
        for path, expected in zip(self._paths, [self.manifest.bin_sha256, self.manifest.idx_sha256], strict=False):
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise DataError(f"{path}: SHA-256 differs from {self._paths[2].name}; {_MEND}")


def _read_manifest(path: Path) -> DatasetManifest:
    try:
        manifest = DatasetManifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise DataError(f"{path}: not a dataset's manifest; {_MEND}") from None
    for field in fields(manifest):
        value = getattr(manifest, field.name)
        assert isinstance(field.type, type)
        if type(value) is not field.type:
            raise DataError(f"{path}: {field.name} is {value!r}, not of type {field.type.__name__}; {_MEND}")
    return manifest
