"""A dataset while it is written: its parts have other names until it is whole, so that a kill neither loses nor shows anything.

PREFIX.bin.partial and PREFIX.lengths.partial grow; `open` truncates them to counts that the caller recorded after a `sync`.
`seal` adds index and manifest. `publish` renames, and may be called again where a kill has interrupted it.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from overtok_megatron.data.index_file import DTYPES, dtype_code, write_index
from overtok_megatron.data.manifest import DatasetManifest, dataset_paths
from overtok_megatron.files import PARTIAL, sync, sync_file


def aside_paths(prefix: str | Path) -> list[Path]:
    """The names of the three parts of a set while it is being written."""
    return [path.with_name(path.name + PARTIAL) for path in dataset_paths(prefix)]


def lengths_path(prefix: str | Path) -> Path:
    """The file with the lengths of the documents of a set while it is being written."""
    return Path(f"{prefix}.lengths{PARTIAL}")


@dataclass(frozen=True)
class Counts:
    """What a set holds so far. source_bytes: of the texts of its documents as UTF-8."""

    documents: int = 0
    tokens: int = 0
    source_bytes: int = 0


class PartialSet:
    """The parts of one dataset. Every method may raise OSError."""

    def __init__(self, prefix: str | Path, vocab_size: int, eod_id: int, tokenizer_fingerprint: str) -> None:
        self.prefix = str(prefix)
        self.paths = dataset_paths(prefix)
        self._aside = aside_paths(prefix)
        self._lengths_path = lengths_path(prefix)
        self._code = dtype_code(vocab_size)
        self._identity = (vocab_size, eod_id, tokenizer_fingerprint)
        self._digest = hashlib.sha256()
        self._files: list[BinaryIO] = []
        self.counts = Counts()

    @property
    def dtype(self) -> type[np.generic]:
        """The dtype in which tokens are stored."""
        return DTYPES[self._code]

    def _sizes(self, counts: Counts) -> list[tuple[Path, int]]:
        size = np.dtype(self.dtype).itemsize
        return [(self._aside[0], counts.tokens * size), (self._lengths_path, counts.documents * 4)]

    def holds(self, counts: Counts) -> bool:
        """Whether the files aside are at least as long as `counts` says."""
        return all(path.is_file() and path.stat().st_size >= size for path, size in self._sizes(counts))

    def open(self, counts: Counts = Counts()) -> None:
        """Begin, or continue behind `counts`: whatever was written after them is cut off."""
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)
        self.counts = counts
        for path, size in self._sizes(counts):
            file = path.open("r+b" if size else "wb")
            self._files.append(file)
            file.truncate(size)
        while block := self._files[0].read(1 << 20) if counts.tokens else b"":
            self._digest.update(block)
        for file in self._files:
            file.seek(0, os.SEEK_END)

    def append(self, tokens: bytes, lengths: bytes, source_bytes: int) -> None:
        """Append documents. tokens: of all of them, in `dtype`; lengths: the number of tokens of each, int32."""
        self._files[0].write(tokens)
        self._files[1].write(lengths)
        self._digest.update(tokens)
        more = Counts(len(lengths) // 4, len(tokens) // np.dtype(self.dtype).itemsize, source_bytes)
        self.counts = Counts(
            self.counts.documents + more.documents,
            self.counts.tokens + more.tokens,
            self.counts.source_bytes + more.source_bytes,
        )

    def sync(self) -> Counts:
        """Sync everything to the disk; returns the counts to record, with which `open` continues."""
        for file in self._files:
            sync_file(file)
        return self.counts

    def seal(self) -> DatasetManifest:
        """Write index and manifest aside; everything is synced, and nothing can be appended any more."""
        self.sync()
        self.close()
        digest = hashlib.sha256()
        with self._aside[1].open("wb") as file:

            def write(data: bytes) -> None:
                file.write(data)
                digest.update(data)

            write_index(write, self._code, self._lengths_path, self.counts.documents)
            sync_file(file)
        vocab_size, eod_id, fingerprint = self._identity
        manifest = DatasetManifest(
            vocab_size=vocab_size,
            eod_id=eod_id,
            tokenizer_fingerprint=fingerprint,
            num_documents=self.counts.documents,
            num_tokens=self.counts.tokens,
            source_bytes=self.counts.source_bytes,
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=digest.hexdigest(),
        )
        with self._aside[2].open("wb") as file:
            file.write(json.dumps(asdict(manifest), indent=1).encode())
            sync_file(file)
        return manifest

    def publish(self) -> None:
        """Rename the sealed parts to their final names, the manifest last; parts that a killed call has renamed stay."""
        if self._aside[2].exists():
            if self._aside[0].exists():
                self.paths[2].unlink(missing_ok=True)  # an old set of this name stops being one before its parts change
            for aside, path in zip(self._aside, self.paths, strict=True):
                if aside.exists():
                    os.replace(aside, path)
        sync(self.paths[0].parent)
        self._lengths_path.unlink(missing_ok=True)

    def discard(self, *, published: bool = False) -> None:
        """Remove the unpublished parts; with `published` also those with their final names."""
        try:
            self.close()  # on a full disk this fails once more
        finally:
            for path in [*self._aside, self._lengths_path, *(self.paths if published else [])]:
                if path.parent.is_dir():
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files; they stay."""
        files, self._files = self._files, []
        try:
            for file in files:
                file.close()
        finally:
            for file in files:  # one that failed to flush still holds its descriptor
                if not file.closed:
                    os.close(file.fileno())
