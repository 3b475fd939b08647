"""Chunks to tokens, in this process or by workers: results come in the order of the chunks, whichever worker made them.

Workers are processes that end when their pipe is closed. So a kill of the parent leaves no process behind, threads in the
parent cannot block them, and unlike multiprocessing they do not run the caller's main module again. They do not import files
of the current folder, whatever their names.
"""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

import overtok_megatron
from overtok_megatron.data.indexed import check_length
from overtok_megatron.data.preparing.account import LeftOut
from overtok_megatron.data.preparing.sources import CHUNK_BYTES, Chunk, ReadOptions, lacks_separator, located_documents
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.errors import DataError

_ROOT = str(Path(overtok_megatron.__file__).parents[1])  # where the package lies
# Behind everything else on the path: a checkout that is the current folder has the package, and may have a profile.py too.
_START = """
import os, site, sys
here = os.path.realpath(os.getcwd())
if here not in map(os.path.realpath, site.getsitepackages()):
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or here) != here]
sys.path.append(sys.argv[2])
from overtok_megatron.data.preparing.encoding import serve
serve(int(sys.argv[1]))
"""
EMPTY = "empty"
NOTHING = "of which the tokenizer keeps nothing"
_AHEAD = 4  # batches per worker that may be done or under way before the first of them is; bounds memory


@dataclass(frozen=True)
class Encoded:
    """What one set gets of a batch: tokens in the set's dtype, int32 lengths, and the UTF-8 bytes that they came from."""

    tokens: bytes
    lengths: bytes
    source_bytes: int


@dataclass(frozen=True)
class EncodedBatch:
    """What each set gets of a batch, and what became of the rest.

    documents: how many of each chunk are not empty. left_out: documents; unsplit: text files without the separator.
    """

    sets: list[Encoded]
    documents: list[int]
    left_out: LeftOut
    unsplit: LeftOut


@dataclass(frozen=True, kw_only=True)
class DocumentEncoder:
    """Encodes chunks for the sets. shares: what part of all documents each set gets, by the hash of
    the document's text.

    threads: of the tokenizer's library, -1 = one per core.
    """

    tokenizer: Tokenizer
    reading: ReadOptions
    shares: tuple[float, ...]
    dtype: type[np.generic]
    threads: int = -1

    def __call__(self, batch: Sequence[Chunk]) -> EncodedBatch:
        """Encode a batch. Raises DataError as `located_documents` does, and on a document that is too long for the format."""
        found: list[tuple[str, bytes, str]] = []
        counts, left, unsplit = [], LeftOut(), LeftOut()
        for chunk in batch:
            before = len(found)
            for text, raw, within in located_documents(chunk, self.reading):
                if raw:
                    found.append((text, raw, f"{chunk.path}: {within}"))
                else:
                    left.add(EMPTY, f"{chunk.path}: {within}")
            counts.append(len(found) - before)
            if lacks_separator(chunk, self.reading):
                unsplit.add(_line_ends(chunk, self.reading), chunk.path)
        ids: list[list[list[int]]] = [[] for _ in self.shares]
        sizes = [0] * len(self.shares)
        encoded = self.tokenizer.encode_batch([text for text, _, _ in found], self.threads)
        for (_, raw, where), tokens in zip(found, encoded, strict=True):
            if not tokens:  # one that normalises, or has no piece for what it does not know
                left.add(NOTHING, where)
                continue
            check_length(len(tokens) + 1, f"{where}: a document of {len(raw)} bytes")
            part = self._part(raw)
            ids[part].append([*tokens, self.tokenizer.eod_id])
            sizes[part] += len(raw)
        sets = [self._pack(part, size) for part, size in zip(ids, sizes, strict=True)]
        return EncodedBatch(sets, counts, left, unsplit)

    def _part(self, raw: bytes) -> int:
        """The set of a document: the same text always goes to the same one."""
        if len(self.shares) == 1:
            return 0
        point = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") / 2**64 * sum(self.shares)
        for part, share in enumerate(self.shares):
            point -= share
            if point < 0:
                return part
        return max(part for part, share in enumerate(self.shares) if share)  # rounding

    def _pack(self, ids: list[list[int]], size: int) -> Encoded:
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), self.dtype, int(lengths.sum(dtype=np.int64)))
        return Encoded(flat.tobytes(), lengths.tobytes(), size)


def _line_ends(chunk: Chunk, reading: ReadOptions) -> str:
    """The likely reason why a separator does not occur, or an empty text."""
    assert reading.separator is not None
    assert isinstance(chunk.payload, bytes)
    plain = "\n" in reading.separator and "\r" not in reading.separator
    return "lines end in \\r\\n" if plain and b"\r\n" in chunk.payload else ""


def batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks of small files together, so that each is worth sending."""
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += chunk.disk_bytes if isinstance(chunk.payload, list) else len(chunk.payload)
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(
    encoder: DocumentEncoder, chunks: Iterable[Chunk], workers: int
) -> Iterator[tuple[list[Chunk], EncodedBatch]]:
    """Every batch with what `encoder` makes of it, in order; worker processes encode where there is more than one.

    Raises DataError as the encoder and the chunks do, and where a worker process ends by itself.
    """
    if workers == 1:
        for batch in batches(chunks):
            yield batch, encoder(batch)
        return
    with _Workers(replace(encoder, threads=1), workers) as pool:
        yield from pool.map(batches(chunks))


class _Workers:
    """Worker processes and a pipe to each, which carries one batch at a time: with two, both ends could wait on full pipes."""

    def __init__(self, encoder: DocumentEncoder, count: int) -> None:
        self._encoder = pickle.dumps(encoder)
        self._count = count
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "_Workers":
        for _ in range(self._count):
            ours, theirs = Pipe()
            command = [sys.executable, "-P", "-c", _START, str(theirs.fileno()), _ROOT]
            self._processes[ours] = subprocess.Popen(command, pass_fds=[theirs.fileno()])
            theirs.close()
        for connection in self._processes:
            with suppress(BrokenPipeError):  # its end is noticed where it is waited for
                connection.send_bytes(self._encoder)
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
            process.wait()

    def map(self, work: Iterator[list[Chunk]]) -> Iterator[tuple[list[Chunk], EncodedBatch]]:
        idle = list(self._processes)
        busy: dict[Connection, int] = {}
        under_way: dict[int, list[Chunk]] = {}
        done: dict[int, EncodedBatch | DataError] = {}
        sent = given = 0
        batch = next(work, None)
        while batch is not None or under_way:
            while batch is not None and idle and sent - given < _AHEAD * self._count:
                connection = idle.pop()
                busy[connection], under_way[sent] = sent, batch
                self._send(connection, batch)
                sent += 1
                batch = next(work, None)
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                done[busy.pop(ready)] = self._receive(ready)
                idle.append(ready)
            while given in done:
                result = done.pop(given)
                if isinstance(result, DataError):
                    raise result
                yield under_way.pop(given), result
                given += 1

    def _send(self, connection: Connection, batch: list[Chunk]) -> None:
        try:
            connection.send(batch)
        except BrokenPipeError:
            self._lost(connection)

    def _receive(self, connection: Connection) -> EncodedBatch | DataError:
        try:
            answer = connection.recv()
        except (EOFError, ConnectionResetError):
            self._lost(connection)
        assert isinstance(answer, EncodedBatch | DataError), f"a worker failed:\n{answer}"
        return answer

    def _lost(self, connection: Connection) -> None:
        code = self._processes[connection].wait()
        why = "perhaps for want of memory; try fewer --workers" if code < 0 else "for the reason that it printed"
        raise DataError(f"a worker that encodes text ended with code {code}, {why}")


def work(connection: Connection) -> None:
    """Encode batches until the parent closes the pipe or has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # the library would start threads for every core in every worker
    try:
        encoder: DocumentEncoder = pickle.loads(connection.recv_bytes())
        while True:
            batch = connection.recv()
            try:
                connection.send(encoder(batch))
            except DataError as error:
                connection.send(error)
            except Exception:
                connection.send(traceback.format_exc())
    except (EOFError, ConnectionError):
        return


def serve(handle: int) -> None:
    """`work` on an inherited pipe: what a worker's process runs."""
    work(Connection(handle))
