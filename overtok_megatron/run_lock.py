"""The locks on a run's folder: only one of train, reshape, prune, import and grow writes into it at a time. Readers take none.

The kernel holds the locks (flock) and releases them when their holder dies, however it dies. There are two, because a
training has several processes, and any of them may be killed alone:

| file | held by |
| --- | --- |
| `.lock` | the writer; for a training the command `overtok train`, or the first rank where no parent process holds the lock |
| `.lock.ranks` | the writer; in a training all ranks share the lock, so that it is held until the last of them is gone |

Each file names its holder. On a file system shared by several hosts flock reaches all of them on NFS (unless mounted with
`nolock` or `local_lock`), Lustre (with `flock`), CephFS, GPFS, CIFS, GFS2 and OCFS2. Elsewhere it may reach this host only,
or there are no locks at all; the process that takes a lock then logs a warning.
"""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from overtok_megatron.errors import CheckpointError, InUseError
from overtok_megatron.files import LOCK

log = logging.getLogger(__name__)

COMMAND, RANKS = LOCK, f"{LOCK}.ranks"
LOCK_FILES = frozenset((COMMAND, RANKS))
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_THIS_HOST_ONLY = ("fuse", "9p", "virtiofs", "vboxsf", "prl_fs", "beegfs", "afs")
_LOCAL_OPTIONS = {"nfs": ("nolock", "local_lock=all", "local_lock=flock"), "lustre": ("localflock",)}


class RunLock:
    """The locks of one process on one run's folder; they end with the process, or with `release`."""

    def __init__(self, run: Path, work: str) -> None:
        """work: what this process does there, as other processes are told that find the folder in use."""
        self.run = run
        self._work = work
        self._files: dict[str, BinaryIO] = {}
        self.exists = True  # False once the file system has said that it has no locks

    def warning(self) -> str | None:
        """A sentence on the processes that these locks do not keep away; None where they keep away all of them."""
        if not self.exists:
            return f"{self.run}: this file system has no locks: nothing keeps a second process from writing here"
        return reach(self.run)

    def take(self) -> None:
        """Become the only writer. Raises InUseError naming the host and the process that is, CheckpointError without access."""
        self._open_folder()
        try:
            self._take(COMMAND, fcntl.LOCK_EX)
            self._take(RANKS, fcntl.LOCK_EX)
        except BaseException:
            self.release()
            raise

    def lend(self) -> None:
        """Release the ranks' lock, for the ranks of a training that this process starts; keep the other one."""
        self._close(RANKS)

    def ranks_gone(self) -> bool:
        """Whether no rank of a training holds the folder any more, to which this process has lent its lock."""
        try:
            self._take(RANKS, fcntl.LOCK_EX, record=False)
        except CheckpointError:
            return False
        self._remove(RANKS)
        return True

    def take_for_ranks(self) -> None:
        """Lock as a training's first rank: below the command that holds the folder, or alone. Raises as `take` does."""
        self._open_folder()
        try:
            self._take(COMMAND, fcntl.LOCK_EX, allow_ancestor=True)
            if COMMAND in self._files:
                self._take(RANKS, fcntl.LOCK_EX)  # ranks of another training may have outlived what started them
                self._close(RANKS)  # nobody comes to this lock without the other one
            self._take(RANKS, fcntl.LOCK_SH)
        except BaseException:
            self.release()
            raise

    def join_ranks(self) -> None:
        """Lock as one more rank of a training whose first rank holds the folder."""
        self._take(RANKS, fcntl.LOCK_SH, record=False)

    def release(self) -> None:
        """Release all locks. The file of a lock that nobody else shares is removed from the folder."""
        for name in list(self._files):
            self._remove(name)

    def _remove(self, name: str) -> None:
        """Release a lock, and take its file out of the folder where nobody else shares it."""
        with suppress(OSError):
            fcntl.flock(self._files[name], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_current(name):
                (self.run / name).unlink()
        self._close(name)

    def _open_folder(self) -> None:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.run}: cannot be written ({error.strerror}); name another folder") from None

    def _take(self, name: str, kind: int, *, record: bool = True, allow_ancestor: bool = False) -> None:
        """Take one lock. allow_ancestor: go on without the lock where an ancestor of this process holds it."""
        path = self.run / name
        while name not in self._files:
            try:
                file = path.open("a+b")
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except OSError as error:
                holder = _Holder.read(file)
                file.close()
                if error.errno in _NO_LOCKS:
                    self.exists = False
                    return
                if error.errno not in _HELD:
                    raise CheckpointError(f"{path}: cannot be locked ({error.strerror})") from None
                if allow_ancestor and holder is not None and holder.is_ancestor():
                    return
                raise InUseError(
                    f"{self.run}: in use by {holder or 'another process'}; wait for it, end it, or name another folder"
                ) from None
            self._files[name] = file
            if not self._is_current(name):
                self._close(name)  # its last holder took it out of the folder meanwhile
        if record:
            own = _Holder(socket.gethostname(), os.getpid(), psutil.Process().create_time(), self._work)
            own.write(self._files[name])

    def _close(self, name: str) -> None:
        file = self._files.pop(name, None)
        if file is not None:
            file.close()

    def _is_current(self, name: str) -> bool:
        """Whether the file that is locked is the one that others find."""
        try:
            return os.path.samestat(os.fstat(self._files[name].fileno()), (self.run / name).stat())
        except FileNotFoundError:
            return False


def holder_of(run: Path) -> tuple[str, int] | None:
    """(host, process) of the writer that a run's lock names; None where there is none, or it has not written its name yet.

    Not in a place that must be sure of it: the record of a writer that was killed stays.
    """
    try:
        with (run / COMMAND).open("rb") as file:
            holder = _Holder.read(file)
    except OSError:
        return None
    return None if holder is None else (holder.host, holder.process)


@dataclass(frozen=True)
class _Holder:
    """What a lock's file says about its holder."""

    host: str
    process: int
    started: float  # seconds since the epoch; containers give the same process ids, and some the same host names
    work: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} ({self.work})"

    @staticmethod
    def read(file: BinaryIO) -> "_Holder | None":
        file.seek(0)
        try:
            return _Holder(**json.loads(file.read()))
        except (OSError, ValueError, TypeError):  # not written yet
            return None

    def write(self, file: BinaryIO) -> None:
        file.truncate(0)
        file.write(json.dumps(asdict(self)).encode())
        file.flush()

    def is_ancestor(self) -> bool:
        """Whether this process descends from the holder."""
        ancestors = {one.pid: one.create_time() for one in psutil.Process().parents()}
        return self.host == socket.gethostname() and abs(ancestors.get(self.process, 0.0) - self.started) < 2.0


@contextmanager
def hold(run: Path, work: str) -> Iterator[RunLock]:
    """Be the only writer into the folder `run`, which is made if need be. Raises InUseError naming another writer.

    Where the block fails, the folders that were made for it and are empty are removed.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    lock = RunLock(run, work)
    lock.take()
    try:
        if warning := lock.warning():
            log.warning("%s", warning)
        yield lock
    except BaseException:
        lock.release()
        with suppress(OSError):  # one holds something
            for folder in made:
                folder.rmdir()
        raise
    lock.release()


def reach(run: Path, mounts: str | None = None) -> str | None:
    """A warning where locks in the folder `run` may not reach every host that sees it; None where they do.

    mounts: in the form of /proc/self/mounts, which is read where it is None.
    """
    try:
        text = Path("/proc/self/mounts").read_text(encoding="utf-8") if mounts is None else mounts
    except OSError:  # not Linux
        return None
    mount_point, kind, options = _mount_of(run, text)
    local = next((words for name, words in _LOCAL_OPTIONS.items() if kind.startswith(name)), ())
    if kind.startswith(_THIS_HOST_ONLY) or any(word in options for word in local):
        return (
            f"{run}: {mount_point} ({kind}) may keep locks on this host only: a second process is refused here, and perhaps "
            "not on another host"
        )
    return None


def _mount_of(run: Path, mounts: str) -> tuple[str, str, list[str]]:
    """(mount point, file system, options) of the mount that a path lies on."""
    real, found = run.resolve(), ("/", "unknown", [""])
    for line in filter(None, mounts.splitlines()):
        _, mount_point, kind, options, *_ = line.split(" ")
        mount_point = mount_point.replace("\\040", " ")
        if real.is_relative_to(mount_point) and len(mount_point) >= len(found[0]):
            found = (mount_point, kind, options.split(","))
    return found
