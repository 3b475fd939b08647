"""Make indexed datasets of a corpus, by several processes, in constant memory. An error leaves no file.

A kill, or Ctrl-C, leaves the parts written so far and a journal, PREFIX.journal; the same call continues from there and
writes the same files byte for byte, whatever the number of workers. With shares, documents go to PREFIX-train,
PREFIX-validation and PREFIX-test by the hash of their text.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from overtok_megatron.data.manifest import DatasetManifest, dataset_paths
from overtok_megatron.data.partial_set import Counts, PartialSet
from overtok_megatron.data.preparing.account import Account, LeftOut
from overtok_megatron.data.preparing.encoding import DocumentEncoder, EncodedBatch, encode_all
from overtok_megatron.data.preparing.journal import Journal
from overtok_megatron.data.preparing.ownership import abandoned_paths, journal_path, refuse_outputs
from overtok_megatron.data.preparing.sources import Chunk, Position, ReadOptions, read_chunks
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.errors import DataError

log = logging.getLogger(__name__)

SPLIT = ("train", "validation", "test")
_VERSION = 2  # of what a journal means
_BLANK = "without text"


@dataclass(frozen=True)
class Plan:
    """How sets are made of a corpus. shares: what part of all documents each set of SPLIT gets, None = one set."""

    reading: ReadOptions = field(default_factory=ReadOptions)
    shares: tuple[float, float, float] | None = None
    workers: int = 1
    journal_seconds: float = 5.0  # work that a kill may cost

    def prefixes(self, prefix: str | Path) -> list[str]:
        """The prefixes of the sets that are written, which are those with a share."""
        if self.shares is None:
            return [str(prefix)]
        return [f"{prefix}-{name}" for name, share in zip(SPLIT, self.shares, strict=True) if share]


_EVERY_SET = Plan(shares=(1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Prepared:
    """The manifests of the sets by prefix, and what became of files and documents."""

    manifests: dict[str, DatasetManifest]
    account: Account


def prepare(
    files: Sequence[Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    advance: Callable[[int], object] = lambda size: None,
    separator: str | None = None,
) -> DatasetManifest:
    """Tokenize `files` into the one dataset `prefix`, in this process: `prepare_sets` with its defaults."""
    return prepare_sets(files, prefix, tokenizer, Plan(ReadOptions(separator=separator)), advance).manifests[
        str(prefix)
    ]


def prepare_sets(
    files: Sequence[Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    plan: Plan,
    advance: Callable[[int], object] = lambda size: None,
) -> Prepared:
    """Tokenize `files` as `plan` says. `advance` is called with the bytes on disk that have been read since the last call.

    Raises DataError on damaged or foreign input (naming file and byte or row), where there is no text at all or none for one
    of the sets, where another process writes them, or where they cannot be written; OutputError where they would replace an
    input, or what no earlier call wrote, or would lie beside a set of an earlier split that is not made anew.
    """
    assert plan.reading.separator != "", "an empty separator splits nothing"
    sets = [
        PartialSet(name, tokenizer.vocab_size, tokenizer.eod_id, tokenizer.fingerprint())
        for name in plan.prefixes(prefix)
    ]
    try:
        refuse_outputs(str(prefix), plan.prefixes(prefix), stale_prefixes(plan, prefix), files)
        journal = Journal(journal_path(prefix))
        with _all_or_nothing(sets, journal):
            job = _Job(files=files, prefix=str(prefix), plan=plan, tokenizer=tokenizer, sets=sets, journal=journal)
            return job.run(advance)
    except OSError as error:  # reading has its own DataError, so this is the dataset
        raise DataError(
            f"dataset {prefix}: cannot be written ({error.strerror or error}); free space or name another prefix"
        ) from None


@contextmanager
def _all_or_nothing(sets: Sequence[PartialSet], journal: Journal) -> Iterator[None]:
    """An error removes what was written and the journal; a kill leaves both, to go on from. Files are closed in any case."""
    try:
        yield
    except (DataError, OSError):
        try:
            for one in sets:
                one.discard()
        finally:
            journal.remove()
        raise
    finally:
        for one in sets:
            one.close()
        journal.close()


def stale_prefixes(plan: Plan, prefix: str | Path) -> list[str]:
    """Sets that an earlier split may have left and this one does not write: their documents would be in other sets as well."""
    if plan.shares is None:
        return []
    return [f"{prefix}-{name}" for name, share in zip(SPLIT, plan.shares, strict=True) if not share]


def sets_beside(plan: Plan, prefix: str | Path) -> list[str]:
    """Existing sets of the same prefix and documents: the split ones where this call makes one set, or the reverse."""
    other = _EVERY_SET if plan.shares is None else Plan()
    return [name for name in other.prefixes(prefix) if dataset_paths(name)[2].is_file()]


@dataclass
class _Findings:
    """What became of the files and documents so far. in_file: documents of the file that is being read."""

    in_file: int = 0
    blank_files: LeftOut = field(default_factory=LeftOut)
    documents: LeftOut = field(default_factory=LeftOut)
    unsplit_files: LeftOut = field(default_factory=LeftOut)

    def add(self, batch: Sequence[Chunk], encoded: EncodedBatch) -> None:
        self.documents.merge(encoded.left_out.tallies)
        self.unsplit_files.merge(encoded.unsplit.tallies)
        for chunk, count in zip(batch, encoded.documents, strict=True):
            self.in_file += count
            if chunk.end.file > chunk.begin.file:
                if not self.in_file:
                    self.blank_files.add(_BLANK, chunk.path)
                self.in_file = 0

    def record(self) -> list[Any]:
        """For the journal, of JSON's types."""
        return [self.in_file, self.blank_files.tallies, self.documents.tallies, self.unsplit_files.tallies]

    @classmethod
    def recall(cls, record: list[Any]) -> "_Findings":
        """What `record` returned, read back."""
        result = cls(record[0])
        for left_out, tallies in zip(
            (result.blank_files, result.documents, result.unsplit_files), record[1:], strict=True
        ):
            left_out.merge(tallies)
        return result


class _Job:
    """One call: it begins where the journal says, encodes, seals, publishes, and records in the journal how far it is."""

    def __init__(
        self,
        *,
        files: Sequence[Path],
        prefix: str,
        plan: Plan,
        tokenizer: Tokenizer,
        sets: list[PartialSet],
        journal: Journal,
    ) -> None:
        self._files, self._plan, self._tokenizer = files, plan, tokenizer
        self._sets, self._journal = sets, journal
        self._encoder = DocumentEncoder(
            tokenizer=tokenizer,
            reading=plan.reading,
            shares=tuple(filter(None, plan.shares or (1.0,))),
            dtype=sets[0].dtype,
        )
        forms = [name for form in (Plan(), _EVERY_SET) for name in form.prefixes(prefix)]
        self._abandoned = abandoned_paths(prefix, plan.prefixes(prefix), forms)
        self._found = _Findings()

    def identity(self) -> dict[str, Any]:
        """What must be the same for a call to continue from a journal."""
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self._files]
        return {
            "version": _VERSION,
            "files": hashlib.sha256(repr(stats).encode()).hexdigest(),
            "tokenizer": self._tokenizer.fingerprint(),
            "eod_id": self._tokenizer.eod_id,
            "reading": asdict(self._plan.reading),
            "shares": None if self._plan.shares is None else list(self._plan.shares),
        }

    def run(self, advance: Callable[[int], object]) -> Prepared:
        job = self.identity()
        record = self._journal.last(job)
        if record is not None and "manifests" in record:  # killed while the sets got their names
            self._found = _Findings.recall(record["seen"])
            return self._publish({name: DatasetManifest(**one) for name, one in record["manifests"].items()})
        begin = self._resume(record) or self._start(job)
        advance(sum(path.stat().st_size for path in self._files[: begin.file]) + begin.disk)
        self._encode(begin, advance)
        manifests = self._seal()
        named = {name: asdict(one) for name, one in manifests.items()}
        self._journal.record({"manifests": named, "seen": self._found.record()})
        return self._publish(manifests)

    def _resume(self, record: dict[str, Any] | None) -> Position | None:
        """Open the sets behind what the journal knows; None where it knows nothing, or the sets hold less."""
        if record is None:
            return None
        counts = [Counts(*one) for one in record["counts"]]
        if not all(one.holds(count) for one, count in zip(self._sets, counts, strict=True)):
            return None
        for one, count in zip(self._sets, counts, strict=True):
            one.open(count)
        begin = Position(*record["position"])
        self._found = _Findings.recall(record["seen"])
        log.info("going on at file %d of %d, byte or row %d", begin.file + 1, len(self._files), begin.offset)
        return begin

    def _start(self, job: dict[str, Any]) -> Position:
        """Open the sets anew, and remove what a killed call for other sets left."""
        if self._journal.names_a_job:
            for path in self._abandoned:
                path.unlink(missing_ok=True)
        self._journal.begin(job)
        for one in self._sets:
            one.open()
        return Position()

    def _encode(self, begin: Position, advance: Callable[[int], object]) -> None:
        noted = time.monotonic()
        chunks = read_chunks(self._files, self._plan.reading, begin)
        for batch, encoded in encode_all(self._encoder, chunks, self._plan.workers):
            for one, part in zip(self._sets, encoded.sets, strict=True):
                one.append(part.tokens, part.lengths, part.source_bytes)
            self._found.add(batch, encoded)
            if time.monotonic() - noted >= self._plan.journal_seconds:
                self._note(batch[-1].end)
                noted = time.monotonic()
            advance(sum(chunk.disk_bytes for chunk in batch))

    def _note(self, position: Position) -> None:
        """Record that everything before `position` is on the disk."""
        counts = [astuple(one.sync()) for one in self._sets]
        self._journal.record({"position": astuple(position), "counts": counts, "seen": self._found.record()})

    def _seal(self) -> dict[str, DatasetManifest]:
        """The manifests of the sets by prefix. Raises DataError where one would be empty."""
        documents, left_out = sum(one.counts.documents for one in self._sets), self._found.documents
        if not documents:
            none = f"the corpus is empty: {len(self._files)} files hold no text"
            also = f" that the tokenizer keeps ({left_out.reasons()} of documents)" if left_out.total else ""
            raise DataError(f"{none}{also}; name files or folders that hold some")
        for one in self._sets:
            if not one.counts.documents:
                raise DataError(
                    f"{one.prefix}: none of the {documents} documents falls into its share; a larger one, or 0 (--split)"
                )
        return {one.prefix: one.seal() for one in self._sets}

    def _publish(self, manifests: dict[str, DatasetManifest]) -> Prepared:
        for one in self._sets:
            one.publish()
        self._journal.remove()
        account = Account(
            num_read=len(self._files) - self._found.blank_files.total,
            files=self._found.blank_files,
            num_written=sum(manifest.num_documents for manifest in manifests.values()),
            documents=self._found.documents,
            unsplit=self._found.unsplit_files,
            num_texts=sum(self._plan.reading.kind(path) == "text" for path in self._files),
        )
        return Prepared(manifests, account)
