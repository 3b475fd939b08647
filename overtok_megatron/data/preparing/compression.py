"""Files as streams of their uncompressed content: plain, .gz, .xz, .zst. A file that is cut or damaged raises an error; it is
never read as a shorter text."""

import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from overtok_megatron.errors import DataError

SUFFIXES = (".gz", ".xz", ".zst")
_BLOCK = 1 << 18  # bytes of content at a time


class _DamageError(Exception):
    """What a decompressor says about a file that it cannot go on with."""


def blocks(path: Path, skip: int = 0) -> Iterator[tuple[bytes, int]]:
    """Content from byte `skip` on, block by block, each with the number of bytes on disk that have been read so far.

    Raises DataError, one line, where the file cannot be read, or its compressed content is damaged or cut.
    """
    content, reason = 0, ""
    try:
        with path.open("rb") as file:
            if path.suffix.lower() in SUFFIXES:
                skipping = skip
                stream = {".gz": _gzip, ".xz": _xz, ".zst": _zstd}[path.suffix.lower()](file, path)
            else:
                file.seek(skip)
                content, skipping, stream = skip, 0, _plain(file)
            for block in stream:
                content += len(block)
                passed = min(skipping, len(block))
                skipping -= passed
                if passed < len(block):
                    yield block[passed:], file.tell()
        return
    except _DamageError as error:
        reason = str(error)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    raise DataError(f"{path}: damaged or cut short after byte {content} of its content ({reason}); fetch it again")


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _gzip(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while block := stream.read1(_BLOCK):
                yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _DamageError(error) from None


def _xz(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        with lzma.LZMAFile(file) as stream:
            while block := stream.read1(_BLOCK):
                yield block
    except (lzma.LZMAError, EOFError) as error:
        raise _DamageError(error) from None


def _zstd(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Frame by frame, because the library's own stream reader takes a cut file for a whole one."""
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: .zst needs the package zstandard; pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, whole = decompressor.decompressobj(), True
    while data := file.read(max(1, _BLOCK >> 6)):
        while data:
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise _DamageError(error) from None
            whole, data = frame.eof, frame.unused_data
            if whole:
                frame = decompressor.decompressobj()
    if not whole:
        raise _DamageError("Compressed file ended before the end of a frame")
