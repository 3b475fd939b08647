"""One writer to a run's folder, whichever of its processes dies; a process that is kept out is told who the writer is."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from overtok_megatron.run_lock import COMMAND, LOCK_FILES, RANKS, RunLock, hold, reach
from support.expect_error import expect_error

# A process that does one thing to a folder, says so, and waits until it is told to end.
HOLDER = """
import subprocess, sys, pathlib
from overtok_megatron.run_lock import RunLock
how, run, *below = sys.argv[1:]
lock = RunLock(pathlib.Path(run), how)
if how == "train":
    lock.take(); lock.lend()
    ranks = subprocess.Popen([sys.executable, "-c", below[0], "first rank", run, below[0]], stdout=subprocess.PIPE, text=True)
    print(ranks.stdout.readline().strip(), ranks.pid, flush=True)
elif how == "first rank":
    lock.take_for_ranks(); print("holds", flush=True)
elif how == "other rank":
    lock.join_ranks(); print("holds", flush=True)
else:
    lock.take(); print("holds", flush=True)
sys.stdin.readline()
lock.release()
"""


def start(how: str, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, how, str(run), HOLDER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.first_line = process.stdout.readline()  # type: ignore[attr-defined]
    assert process.first_line.startswith("holds")  # type: ignore[attr-defined]
    return process


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(run: Path, process: int, work: str) -> None:
    for take in (RunLock.take, RunLock.take_for_ranks):
        words = f"{run}: in use by process {process} on {os.uname().nodename} ({work}); wait for it"
        expect_error(lambda take=take: take(RunLock(run, "test")), words)  # type: ignore[misc]
    assert not any(path.suffix == ".partial" for path in run.iterdir())


def is_empty(run: Path) -> bool:
    """Whether a folder is not there, or holds nothing but locks."""
    return not run.exists() or all(path.name in LOCK_FILES for path in run.iterdir())


def free(run: Path) -> None:
    for take in (RunLock.take, RunLock.take_for_ranks):
        lock = RunLock(run, "test")
        take(lock)
        lock.release()
    assert is_empty(run)


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = start("reshape", run)
    refused(run, holder.pid, "reshape")
    kill(holder.pid)
    free(run)
    assert list(run.iterdir()) == []


def test_a_training_is_held_by_its_command_and_by_each_of_its_ranks(tmp_path: Path) -> None:
    """The launcher dies first, then the first rank, then the last one; each of those that are left keeps others out."""
    run = tmp_path / "run"
    launcher = start("train", run)
    first = int(launcher.first_line.split()[1])  # type: ignore[attr-defined]
    other = start("other rank", run)
    refused(run, launcher.pid, "train")
    kill(launcher.pid)
    refused(run, first, "first rank")
    kill(first)
    refused(run, first, "first rank")  # told by its record, for the other one still writes
    kill(other.pid)
    free(run)


def test_ranks_without_a_command_above_them_hold_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start("first rank", run)
    refused(run, first.pid, "first rank")
    first.communicate("\n")
    free(run)
    assert list(run.iterdir()) == []


def test_a_record_of_a_dead_holder_lets_nobody_in_below_it(tmp_path: Path) -> None:
    """Process ids are reused, above all in containers: a parent's id in a record does not prove that it holds the lock."""
    record = {"host": os.uname().nodename, "process": os.getpid(), "started": psutil.Process().create_time()}
    (tmp_path / COMMAND).write_text(json.dumps(record | {"work": "train"}))
    first = start("first rank", tmp_path)
    assert json.loads((tmp_path / COMMAND).read_text())["process"] == first.pid
    first.communicate("\n")


def test_a_namesake_of_a_process_above_lets_nobody_in(tmp_path: Path) -> None:
    """Nor while the lock is held, by another of the same number: it began at another time."""
    holder = start("reshape", tmp_path)
    record = json.loads((tmp_path / COMMAND).read_text())
    (tmp_path / COMMAND).write_text(json.dumps(record | {"process": os.getppid(), "started": 60.0}))
    expect_error(lambda: RunLock(tmp_path, "train").take_for_ranks(), "in use by process")
    holder.communicate("\n")


def fail_in(folder: Path, *names: str) -> None:
    """Write some files under the lock, and fail."""
    with hold(folder, "import"):
        assert is_empty(folder)
        for name in names:
            (folder / name).touch()
        raise ZeroDivisionError


def test_what_fails_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_in(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ZeroDivisionError):
        fail_in(tmp_path / "new", "file")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    with hold(tmp_path, "grow"):
        assert {path.name for path in tmp_path.iterdir()} == LOCK_FILES | {"new"}
    assert not {path.name for path in tmp_path.iterdir()} & LOCK_FILES
    (tmp_path / "file").touch()
    expect_error(lambda: RunLock(tmp_path / "file" / "run", "train").take(), "cannot be written")


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path, "prune"):
        pass
    assert f"{tmp_path}: this file system has no locks" in caplog.text


MOUNTS = """
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2,local_lock=none 0 0
server:/old /old nfs rw,nolock,local_lock=all 0 0
mds@tcp:/scratch /scratch lustre rw,flock 0 0
mds@tcp:/fast /fast lustre rw,localflock 0 0
sshfs#host: /home/mine\\040too fuse.sshfs rw 0 0
"""


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        ("/var/run", None),
        ("/home/runs/a", None),
        ("/scratch/a", None),
        ("/old/a", "nfs"),
        ("/fast/a", "lustre"),
        ("/home/mine too/a", "fuse.sshfs"),
    ],
)
def test_locks_that_reach_this_host_only_are_said(run: str, kind: str | None) -> None:
    said = reach(Path(run), MOUNTS)
    assert said is None if kind is None else said is not None and f"({kind}) may keep locks on this host only" in said


def test_the_ranks_lock_is_not_taken_out_while_another_rank_has_it(tmp_path: Path) -> None:
    first, other = start("first rank", tmp_path), start("other rank", tmp_path)
    first.communicate("\n")
    assert (tmp_path / RANKS).exists()
    other.communicate("\n")
    free(tmp_path)
