"""Find the files of a corpus: those that are named, those in folders, those that patterns match; and what is left out, and why.

Links are followed, to folders too, and every file is read once, however often it is named or linked. Everything that is
found and not read is counted as left out, with a reason.
"""

import glob
import os
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from overtok_megatron.data.manifest import dataset_paths, read_manifest
from overtok_megatron.data.preparing.account import LeftOut
from overtok_megatron.data.preparing.compression import SUFFIXES, blocks
from overtok_megatron.data.preparing.sources import KINDS, ReadOptions, kind_by_name
from overtok_megatron.errors import DataError, OutputError

HIDDEN = "hidden"
UNKNOWN = "without a known suffix"
AGAIN = "read already under another name"
DANGLING = "behind a broken link"
SPECIAL = "not regular"
REPEATED = "linked to a folder read already"
UPWARDS = "linked to a folder above"
OWN = "of a prepared set"
TOKENIZER = "used as the tokenizer"
FOLDER = "matched as a folder"

# What a file without a known suffix, which is taken for text, is by its first bytes.
_DISGUISES = (
    (
        re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\{\s*[\"}]|\[\s*[\[{])"),
        "looks like JSON; give --format jsonl, or --format text for it as it is",
    ),
    (re.compile(rb"PAR1"), "looks like Parquet; give --format parquet, or name it .parquet"),
    (re.compile(rb".{257}ustar", re.DOTALL), "is a tar archive; unpack it, and name its folder"),
)


@dataclass
class Inputs:
    """The files to read, in order, and what else was found."""

    files: list[Path] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def expand(inputs: Sequence[str | Path]) -> list[Path]:
    """The files of `find_inputs` alone."""
    return find_inputs(inputs).files


def find_inputs(
    inputs: Sequence[str | Path],
    reading: ReadOptions = ReadOptions(),  # noqa: B008  # frozen
    *,
    outputs: Collection[Path] = (),
    tokenizer: Path | None = None,
) -> Inputs:
    """Files as they are, folders as the corpus files below them, patterns as what they match; each in sorted order.

    Below a folder, hidden names and names without a known suffix are left out. outputs: what the caller writes; it is left
    out where a folder or a pattern leads to it, as is `tokenizer`. Raises DataError on a missing file, a folder without
    corpus files, a pattern that matches nothing, and a named file without a known suffix that is not the text that it would
    be taken for; OutputError where an output is named as an input.
    """
    search = _Search(reading, outputs, tokenizer)
    if "" in inputs:  # as a path it would be the current folder
        raise DataError("an input is empty, as an unset variable of the shell is; name a file, a folder or a pattern")
    for path in map(Path, inputs):
        if os.path.isfile(path):
            search.named(path)
        elif os.path.isdir(path):
            search.folder(path)
        elif os.path.exists(path):
            raise DataError(f"{path}: neither a file nor a folder; write its content to a file and name that")
        elif glob.has_magic(str(path)):
            search.pattern(path)
        elif path.is_symlink():
            raise DataError(f"{path}: a link to {os.readlink(path)}, which is not there; mend the link")
        else:
            raise DataError(f"{path}: no such file or folder")
    return search.found


class _Search:
    """Collects what one call finds."""

    def __init__(self, reading: ReadOptions, outputs: Collection[Path], tokenizer: Path | None) -> None:
        self._reading = reading
        self._outputs = {os.path.realpath(path) for path in outputs}
        if tokenizer is not None and tokenizer.is_dir():
            tokenizer = tokenizer / "tokenizer.json"
        self._tokenizer = None if tokenizer is None else os.path.realpath(tokenizer)
        self._read: set[str] = set()  # real paths
        self.found = Inputs()

    def named(self, path: Path) -> None:
        """A file that the user named."""
        if os.path.realpath(path) in self._outputs:
            raise OutputError(f"{path}: is an input, and would be written over; name another --output")
        self._take([path])

    def folder(self, path: Path) -> None:
        """The corpus files below a folder, links to other folders included."""
        left = LeftOut()
        files = [file for file in _below(path, left) if self._belongs(file, left, by_name=True)]
        if not files:
            suffixes = f"{', '.join(KINDS)} files, plain or {', '.join(SUFFIXES)}"
            raise DataError(f"{path}: holds no {suffixes}: the corpus is empty" + _also(left))
        self.found.left_out.merge(left.tallies)
        self._take(files)

    def pattern(self, path: Path) -> None:
        """The files that a pattern matches; of a folder that it matches, only the files that it matches as well."""
        left = LeftOut()
        matches = list(map(Path, glob.iglob(str(path), recursive=True)))
        folders = [match for match in matches if os.path.isdir(match)]
        files = [match for match in matches if not os.path.isdir(match)]
        above = {folder for file in files for folder in file.parents}
        for folder in folders:
            if folder not in above:
                left.add(FOLDER, f"{folder}/")
        files = [file for file in files if self._belongs(file, left)]
        if not files:
            raise DataError(f"{path}: matches no file" + _also(left))
        self.found.left_out.merge(left.tallies)
        self._take(files)

    def _belongs(self, path: Path, left: LeftOut, *, by_name: bool = False) -> bool:
        """Whether a file that was found, not named, is part of the corpus; the reason why not goes to `left`."""
        real = os.path.realpath(path)
        reason = None
        if not os.path.exists(path):
            if not path.is_symlink():
                raise DataError(f"{path}: cannot be read; grant access to its folder, or leave it out")
            reason = DANGLING
        elif not os.path.isfile(path):
            reason = SPECIAL
        elif by_name and path.name.startswith("."):
            reason = HIDDEN
        elif real in self._outputs or _is_of_set(path):
            reason = OWN
        elif real == self._tokenizer:
            reason = TOKENIZER
        elif by_name and kind_by_name(path) is None:
            reason = UNKNOWN
        if reason is not None:
            left.add(reason, path)
        return reason is None

    def _take(self, files: list[Path]) -> None:
        """Read these files in sorted order, each once: under its own name rather than that of a link to it."""
        taken = []
        for path in sorted(files, key=lambda file: (file.is_symlink(), file)):
            real = os.path.realpath(path)
            if real in self._read:
                self.found.left_out.add(AGAIN, path)
                continue
            if self._reading.format is None and kind_by_name(path) is None:
                _refuse_disguised(path)
            self._read.add(real)
            taken.append(path)
        self.found.files += sorted(taken)


def _also(left: LeftOut) -> str:
    return f" ({left.reasons()})" if left.total else ""


def _below(root: Path, left: LeftOut) -> Iterator[Path]:
    """Yield what is below a folder and is not a folder itself, in no order. Hidden folders are left out; each is read once."""
    top = os.path.realpath(root)
    seen: set[tuple[int, int]] = set()
    pending, links = [root], deque[Path]()
    while pending or links:
        if pending:
            folder = pending.pop()
        else:  # only now, so that names without links go first
            folder = links.popleft()
            if os.path.commonpath([top, real := os.path.realpath(folder)]) == real:
                left.add(UPWARDS, f"{folder}/")
                continue
            if _identity(folder) in seen:
                left.add(REPEATED, f"{folder}/")
                continue
        if _identity(folder) in seen:
            continue  # below a linked folder, and walked by its own name
        seen.add(_identity(folder))
        for entry in _entries(folder):
            path = folder / entry.name
            if not os.path.isdir(path):
                yield path
            elif entry.name.startswith("."):
                _leave_out_hidden(path, left)
            else:
                (links if entry.is_symlink() else pending).append(path)


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); grant access, or leave it out") from None


def _leave_out_hidden(folder: Path, left: LeftOut) -> None:
    count = sum(len(files) for _, _, files in os.walk(folder))
    if count:
        left.add(HIDDEN, f"{folder}/ ({count:,} files)", count)


def _is_of_set(path: Path) -> bool:
    """Whether a file is one of the three of a dataset with a manifest."""
    if path.suffix not in (".bin", ".idx", ".json"):
        return False
    *parts, manifest = dataset_paths(path.with_suffix(""))
    if not any(part.exists() for part in parts):
        return False
    try:
        read_manifest(manifest)
    except (DataError, OSError):
        return False
    return True


def _refuse_disguised(path: Path) -> None:
    """Raise DataError where a file would be read as text by its name and is something else by its first bytes."""
    head, _ = next(blocks(path), (b"", 0))
    for pattern, what in _DISGUISES:
        if pattern.match(head):
            raise DataError(f"{path}: has no known suffix, and {what}")
