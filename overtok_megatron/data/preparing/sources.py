"""Corpus files to chunks of raw content, in order and in constant memory; chunks to documents.

`read_chunks` runs in one process and only cuts: at lines of JSONL, at separators of text, at batches of Parquet rows.
`documents` does the rest (UTF-8, JSON) in the process that gets the chunk. The documents do not depend on where the cuts are.
Not here: which files (inputs.py), and any cleaning of the text, except that a byte-order mark is dropped.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from overtok_megatron.data.preparing import compression
from overtok_megatron.data.preparing.compression import blocks
from overtok_megatron.data.preparing.parquet import parquet_rows
from overtok_megatron.errors import DataError
from overtok_megatron.files import EncodingError, decode_text, shown

KINDS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
FORMATS = tuple(dict.fromkeys(KINDS.values()))
CHUNK_BYTES = 1 << 19  # content of a chunk, about; a document that is longer makes a longer one


@dataclass(frozen=True)
class ReadOptions:
    """How files are read. format: None = by the file's name; key: of JSON objects, or the Parquet column."""

    format: str | None = None
    key: str = "text"
    separator: str | None = None

    def kind(self, path: Path) -> str:
        """text, jsonl or parquet; an unknown name is text."""
        return self.format or kind_by_name(path) or "text"


@dataclass(frozen=True)
class Position:
    """Where reading goes on: the file's number, the byte of its content (or its row), the line; disk: bytes read of the file.

    A journal stores the fields in this order.
    """

    file: int = 0
    offset: int = 0
    line: int = 1
    disk: int = 0


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Whole documents of one file. payload: raw bytes, or the values of Parquet rows; disk_bytes: its share of the file."""

    path: Path
    kind: str
    begin: Position
    end: Position
    payload: bytes | list[object]
    disk_bytes: int


def kind_by_name(path: Path) -> str | None:
    """The format of a file by its suffix, in lower or upper case; None where the suffix is not known."""
    plain = path.with_suffix("") if path.suffix.lower() in compression.SUFFIXES else path
    return KINDS.get(plain.suffix.lower())


def read_chunks(
    files: Sequence[Path], reading: ReadOptions, begin: Position | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """All files from `begin` on; the last chunk of each file, maybe an empty one, ends at the next file's first byte.

    Raises DataError naming file and byte or row where content is damaged or cut.
    """
    begin = begin or Position()
    for number in range(begin.file, len(files)):
        path = files[number]
        kind = reading.kind(path)
        start = begin if number == begin.file else Position(number)
        size = _size(path)
        if kind == "parquet":
            pieces: Iterator[tuple[bytes | list[object], Position]] = _row_pieces(path, reading.key, start, size)
        else:
            separator = "\n" if kind == "jsonl" else reading.separator
            pieces = _byte_pieces(path, separator, start, size, chunk_bytes)
        for payload, end in pieces:
            disk_bytes = (size if end.file > number else end.disk) - start.disk
            yield Chunk(path=path, kind=kind, begin=start, end=end, payload=payload, disk_bytes=disk_bytes)
            start = end


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _byte_pieces(
    path: Path, separator: str | None, start: Position, size: int, chunk_bytes: int
) -> Iterator[tuple[bytes | list[object], Position]]:
    """Content cut behind separators, each piece with the position behind it; without a separator a file is one piece."""
    mark = None if separator is None else separator.encode()
    rest = bytearray()
    offset, line, searched, cut = start.offset, start.line, 0, 0
    for block, disk in blocks(path, start.offset):
        rest += block
        if mark is None:
            continue
        cut = _last_end(rest, mark, searched, cut)
        searched = max(cut, len(rest) - len(mark) + 1)
        if cut >= chunk_bytes:
            payload = bytes(rest[:cut])
            del rest[:cut]
            offset, searched, cut = offset + len(payload), searched - cut, 0
            line += payload.count(b"\n")
            yield payload, Position(start.file, offset, line, min(disk, size))
    yield bytes(rest), Position(start.file + 1)


def _last_end(content: bytearray, mark: bytes, begin: int, last: int) -> int:
    """Where the last mark from `begin` on ends, `last` if there is none; marks are found left to right, as str.split does."""
    if len(mark) == 1:
        return max(last, content.rfind(mark, begin) + 1)
    while (found := content.find(mark, begin)) >= 0:
        last = begin = found + len(mark)
    return last


def _row_pieces(path: Path, key: str, start: Position, size: int) -> Iterator[tuple[bytes | list[object], Position]]:
    row = start.offset
    for values, total in parquet_rows(path, key, start.offset):
        row += len(values)
        yield values, Position(start.file, row, row + 1, size * row // (total + 1))
    yield [], Position(start.file + 1)


def lacks_separator(chunk: Chunk, reading: ReadOptions) -> bool:
    """Whether a chunk is a whole text file in which the separator that was given does not occur."""
    if reading.separator is None or chunk.kind != "text" or not chunk.payload:
        return False
    whole = chunk.begin.offset == 0 and chunk.end.file > chunk.begin.file
    return whole and isinstance(chunk.payload, bytes) and reading.separator.encode() not in chunk.payload


def documents(chunk: Chunk, reading: ReadOptions) -> Iterator[tuple[str, bytes]]:
    """The non-empty documents of a chunk, as text and as UTF-8. Raises DataError as `located_documents` does."""
    for text, raw, _ in located_documents(chunk, reading):
        if raw:
            yield text, raw


def located_documents(chunk: Chunk, reading: ReadOptions) -> Iterator[tuple[str, bytes, str]]:
    """All documents of a chunk as text, as UTF-8, and with their location within the file, as `line 3`.

    Values of JSON and Parquet may be empty; two separators of a text with nothing between them do not make a document.
    Raises DataError naming file and line, row or byte of what is not text, is not a JSON object, or lacks the key.
    """
    if isinstance(chunk.payload, list):
        for number, value in enumerate(chunk.payload, chunk.begin.offset):
            within = f"row {number}"
            yield *_checked(value, f"{chunk.path}: {within}", reading.key), within
    elif chunk.kind == "jsonl":
        yield from _json_documents(chunk, chunk.payload, reading.key)
    else:
        yield from _text_documents(chunk, chunk.payload, reading.separator)


def read_documents(files: Sequence[Path], reading: ReadOptions) -> Iterator[str]:
    """Every document of every file, one after the other, in this process."""
    for chunk in read_chunks(files, reading):
        for text, _ in documents(chunk, reading):
            yield text


_COMPRESSED = {b"\x1f\x8b": ".gz", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return decode_text(data, offset)
    except EncodingError as error:
        for mark, suffix in _COMPRESSED.items():
            if offset == 0 and data.startswith(mark):
                raise DataError(f"{where}: compressed, by its first bytes; let its name end in {suffix}") from None
        raise DataError(f"{where}: {error}") from None


def _text_documents(chunk: Chunk, payload: bytes, separator: str | None) -> Iterator[tuple[str, bytes, str]]:
    text = _decode(payload, f"{chunk.path}", chunk.begin.offset)
    offset, step = chunk.begin.offset, 0 if separator is None else len(separator.encode())
    if offset == 0 and payload.startswith(codecs.BOM_UTF8):
        offset = len(codecs.BOM_UTF8)
    for part in [text] if separator is None else text.split(separator):
        raw = part.encode()
        if raw:
            yield part, raw, f"byte {offset}"
        offset += len(raw) + step


def _json_documents(chunk: Chunk, payload: bytes, key: str) -> Iterator[tuple[str, bytes, str]]:
    offset = chunk.begin.offset
    for number, line in enumerate(payload.split(b"\n"), chunk.begin.line):
        within = f"line {number}"
        where = f"{chunk.path}: {within}"
        text = _decode(line, where, offset).removeprefix("\ufeff")  # joined files have marks in their middle
        if text.strip():
            try:
                value = json.loads(text)
            except ValueError as error:
                reason = str(error).split(": line")[0]
                raise DataError(
                    f"{where} (byte {offset}): not JSON ({reason}); a line holds one object, cut files are fetched again"
                ) from None
            except RecursionError:
                raise DataError(f"{where} (byte {offset}): JSON nested too deeply; drop the line") from None
            if not isinstance(value, dict):
                raise DataError(f"{where} (byte {offset}): a JSON {type(value).__name__}; a line holds one object")
            if key not in value:
                keys = shown(", ".join(sorted(value)) or "none")[:100]
                raise DataError(f"{where} (byte {offset}): has no key {key!r}; its keys are {keys} (--key)")
            yield *_checked(value[key], f"{where} (byte {offset})", key), within
        offset += len(line) + 1


def _checked(value: object, where: str, key: str) -> tuple[str, bytes]:
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is of type {type(value).__name__}, not text; mend or drop it (--key)")
    try:
        return value, value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise DataError(
            f"{where}: {key!r} holds half a surrogate pair (U+{code:04X}), which no text has; mend or drop it"
        ) from None
