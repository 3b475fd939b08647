"""Files that are written whole or not at all, follow the umask, and never replace a file that is not ours.

Also how the text files that others wrote are read: byte-order marks, and encodings that are not UTF-8. Not here:
checkpoints (checkpoint/store.py) and datasets of several parts (data/partial_set.py), which outlive a kill in their own ways.
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

PARTIAL = ".partial"  # what names of things that are being written end in
_MARKS = (  # UTF-32's first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_LOCK = ".lock"  # what names of a run's locks begin with; whoever is killed leaves them
_FOLDER_MARK = "overtok.partial"  # in a folder that is being written
_HEAD = 1024  # bytes that are looked at for an encoding without a mark


class EncodingError(ValueError):
    """A text is not UTF-8. The message says what it is, where, and the way out; the caller puts the file's name before it."""


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets the name `path`, synced, when the block ends; an error leaves `path` as it was.

    It is written beside `path` under a name that nobody else has, so that nothing of others is written over meanwhile.
    Raises OSError as the disk does.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a small file: readers see the old or the new content, never a part. A text is written as UTF-8."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that gets the name `path`, where nothing or an empty folder is, when the block ends; an error leaves
    nothing. What a killed call left beside `path` is removed; it is known by a file of ours in it.

    Raises OSError as the disk does, OutputError where the name beside `path` is somebody else's.
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
        aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(path.parent)


def refuse_used_folder(path: Path, flag: str = "--output", but: Collection[str] = ()) -> None:
    """Raise OutputError where `path` is a file, or a folder that holds something. but: names that may be in it."""
    if os.path.lexists(path) and not path.is_dir():
        raise OutputError(f"{path}: is there already and is not a folder; name another {flag}")
    try:
        names = sorted(os.listdir(path)) if path.is_dir() else []
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}); name another {flag}") from None
    found = [name for name in names if name not in but and not name.startswith(_LOCK)]
    if found:
        raise OutputError(f"{path}: is not empty (it holds {found[0]}); name another output folder ({flag})")


def follow_umask(path: Path) -> None:
    """Give a file the mode that `open` would have given it: some libraries make theirs readable by their owner alone.

    The umask is not asked for, since asking sets it for every thread: an empty file is made in the folder and looked at,
    which respects a folder's default access list as well.
    """
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    with probe.open("xb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    probe.unlink()
    if path.stat().st_mode & 0o777 != mode:  # where modes are the file system's, they agree, and none can be set
        path.chmod(mode)


def refuse_foreign(path: Path, ours: bool | Callable[[Path], bool], what: str, flag: str = "--output") -> None:
    """Raise OutputError where something lies at `path` that is not ours. what: what alone may be replaced there."""
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
    """(device, inode) of what a name leads to; None where it leads nowhere."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def shown(text: object) -> str:
    """A name or a message in one line that any terminal can print: what is not printable is escaped."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))


def decode_text(content: bytes, place: int = 0) -> str:
    """A text in UTF-8, without the byte-order mark that may begin its file. place: of the first byte within the file.

    Raises EncodingError on anything else; UTF-16 and UTF-32 are called by their names.
    """
    if place == 0:
        _refuse_wide(content)
        if content.startswith(codecs.BOM_UTF8):
            content, place = content[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EncodingError(f"not UTF-8 at byte {place + error.start}; convert it, for example with iconv") from None


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
