"""Processes of this host as the kernel knows them: their states, how they ended, and how to end them by SIGKILL."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_STATES = {  # by the letter in /proc/PID/stat
    "R": "its process computes",
    "S": "its process waits",
    "D": "its process waits in the kernel for a disk or a driver",
    "T": "its process is stopped",
    "t": "its process is stopped by a debugger",
}


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on; none where the process is not there any more."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def state_of(process: int) -> str:
    return _STATES.get((_stat(process) or ["gone"])[0], "its process has ended")


def how_it_ended(process: int) -> str:
    """How a process ended, as long as its parent has not waited for it; after that only that it died."""
    fields = _stat(process)
    if not fields:
        return "died"
    status = int(fields[-1])
    if os.WIFSIGNALED(status):
        return f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with exit code {os.WEXITSTATUS(status)}"


def pidfd_of(process: int) -> int | None:
    """A file descriptor of a process; None where it has died and its parent has waited for it."""
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:
        return None


def kill(pidfd: int | None) -> None:
    """SIGKILL the process of a file descriptor, if it has one and is still there."""
    if pidfd is not None:
        with suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def kill_tree(process: int, pidfd: int | None) -> None:
    """SIGKILL a process and its descendants. pidfd: as in `kill`, of this process."""
    started: list[Any] = []
    with suppress(psutil.Error):
        started = psutil.Process(process).children(recursive=True)
    kill(pidfd)
    for one in started:
        with suppress(psutil.Error):
            one.kill()
