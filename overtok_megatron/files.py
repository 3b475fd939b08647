"""Writes files whole or not at all, with the mode of the umask, and never over a file that is not ours.

Also how the text files that others wrote are read: byte-order marks, and encodings that are not UTF-8. Checkpoints
(checkpoint/store.py) and datasets of several parts (data/partial_set.py) survive a kill by protocols of their own, made of the
functions for syncing and renaming here.
"""

import codecs
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from overtok_megatron.errors import OutputError

PARTIAL = ".partial"  # suffix of the names of files and folders that are being written
_MARKS = (  # UTF-32's first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
LOCK = ".lock"  # prefix of the names of a run's locks; a killed process leaves its locks behind
_FOLDER_MARK = "overtok.partial"  # a file that marks a folder as one that is being written by this program
_HEAD = 1024  # bytes that are examined for an encoding without a mark


class EncodingError(ValueError):
    """A text is not UTF-8. The message says what it is, where, and how to convert it; the caller adds the file's name."""


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(file: BinaryIO) -> None:
    """Force to disk what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def sync_folders(root: Path) -> None:
    """Force the names in a folder and in all folders below it to disk."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        sync(folder)


def rename_synced(aside: Path, path: Path) -> None:
    """Give the file or folder `aside` the name `path`, on disk; a file of that name is replaced."""
    os.replace(aside, path)
    sync(path.parent)


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write that gets the name `path`, synced, when the block ends; an error leaves `path` as it was.

    The file is written beside `path` under a name that nobody else has, so that nothing of others is written over meanwhile.
    durable: False = nothing is synced, for a file that may be lost when the host crashes; after the rename its folder is
    not touched any more. Raises OSError as the disk does.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with aside.open("xb") as file:
            yield file
            if durable:
                sync_file(file)
        if durable:
            rename_synced(aside, path)
        else:
            os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a small file: readers see the old or the new content, never a part. A text is written as UTF-8.

    durable: as `whole_file`'s.
    """
    with whole_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that gets the name `path`, where nothing or an empty folder is, when the block ends.

    An error leaves nothing. What a killed call left beside `path` is removed; it is recognised by a file of ours in it. Raises
    OSError as the disk does, OutputError where a folder of somebody else has the name beside `path`.
    """
    path = Path(os.path.realpath(path))  # through a link to an empty folder, say on a larger disk
    aside = path.with_name(path.name + PARTIAL)
    mark = aside / _FOLDER_MARK
    ours = mark.is_file() or (aside.is_dir() and not any(aside.iterdir()))
    if os.path.lexists(aside) and (aside.is_symlink() or not ours):
        raise OutputError(
            f"{aside}: is there already and is not what a killed call left; move it away, or name another --output"
        )
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        mark.touch()
        yield aside
        mark.unlink()
        sync(aside)
        if path.exists():
            path.rmdir()
        rename_synced(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def refuse_used_folder(path: Path, flag: str = "--output", allowed: Collection[str] = ()) -> None:
    """Raise OutputError where `path` is a file, or a folder that holds something. allowed: names that may be in it."""
    if os.path.lexists(path) and not path.is_dir():
        raise OutputError(f"{path}: is there already and is not a folder; name another {flag}")
    try:
        names = sorted(os.listdir(path)) if path.is_dir() else []
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}); name another {flag}") from None
    found = [name for name in names if name not in allowed and not name.startswith(LOCK)]
    if found:
        raise OutputError(f"{path}: is not empty (it holds {found[0]}); name another output folder ({flag})")


def follow_umask(path: Path) -> None:
    """Give a file the mode that `open` would have given it: some libraries make theirs readable by their owner alone.

    The umask itself cannot be read without setting it for every thread. Instead, an empty file is made in the folder and its
    mode is read, which respects the folder's default access list as well.
    """
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    with probe.open("xb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    probe.unlink()
    if path.stat().st_mode & 0o777 != mode:  # on a file system that fixes modes they are equal, and cannot be set
        path.chmod(mode)


def refuse_foreign(path: Path, ours: bool | Callable[[Path], bool], what: str, flag: str = "--output") -> None:
    """Raise OutputError where something lies at `path` that is not ours. what: the only thing that may be replaced there."""
    if os.path.lexists(path) and not (path.is_file() and (ours(path) if callable(ours) else ours)):
        raise OutputError(f"{path}: is there already and is not {what}; move it away, or name another {flag}")


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path], flag: str = "--output") -> None:
    """Raise OutputError where one of `outputs` is one of `inputs`, by whatever name or link."""
    known = {identity: path for path in outputs if (identity := _identity(path)) is not None}
    for path in inputs if known else ():
        identity = _identity(path)
        output = None if identity is None else known.get(identity)
        if output is not None:
            raise OutputError(f"{path}: is an input, and {output} would be written over it; name another {flag}")


def _identity(path: Path) -> tuple[int, int] | None:
    """(device, inode) of the file that a path leads to; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def shown(text: object) -> str:
    """A name or a message in one line that any terminal can print: characters that are not printable are escaped."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))


def decode_text(content: bytes, offset: int = 0) -> str:
    """Decode UTF-8, without the byte-order mark with which a file may begin. offset: of the first byte within its file.

    Raises EncodingError on anything else; UTF-16 and UTF-32 are called by their names.
    """
    if offset == 0:
        _refuse_wide(content)
        if content.startswith(codecs.BOM_UTF8):
            content, offset = content[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EncodingError(f"not UTF-8 at byte {offset + error.start}; convert it, for example with iconv") from None


def read_text(path: Path) -> str:
    """The text of a small file that somebody else wrote. Raises OSError, or EncodingError as `decode_text` does."""
    return decode_text(path.read_bytes())


def _refuse_wide(content: bytes) -> None:
    for mark, name in _MARKS:
        if content.startswith(mark):
            raise EncodingError(f"{name} by its byte-order mark, not UTF-8; convert it: iconv -f {name} -t UTF-8")
    head = content[:_HEAD]
    low, high = head[0::2], head[1::2]
    for zeros, others, name in ((high, low, "UTF-16LE"), (low, high, "UTF-16BE")):
        if len(head) >= 4 and zeros.count(0) * 2 > len(zeros) and others.count(0) * 10 < len(others):
            raise EncodingError(f"{name} by its zero bytes, not UTF-8; convert it: iconv -f {name} -t UTF-8")


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the first one above it that exists."""
    path = path.absolute()
    return next((one for one in (path, *path.parents) if one.is_dir()), Path("/"))
