"""The console command in a process of its own, and what a test does to it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from overtok_megatron.launching.console import overtok_command


def start_overtok(*arguments: object, stderr: int = subprocess.STDOUT, **settings: Any) -> subprocess.Popen[str]:
    """`overtok` with these arguments, in a session of its own; `settings` are those of Popen."""
    return subprocess.Popen(
        overtok_command(*arguments),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        **settings,
    )


def run_overtok(*arguments: object, **settings: Any) -> tuple[int, str]:
    """(exit code, output); a command that hangs is killed and fails the test."""
    process = start_overtok(*arguments, **settings)
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        kill_session(process)
    return process.returncode, output


def kill_session(process: subprocess.Popen[str]) -> None:
    """SIGKILL the command and everything that it started, but for the watchdog, which leaves by itself."""
    while living := [pid for pid, _ in session_of(process)]:
        for pid in living:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        time.sleep(0.001)
    process.wait()


def session_of(process: subprocess.Popen[str]) -> list[tuple[int, list[bytes]]]:
    """Process ids and command lines of what runs in a started command's session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            state, _, _, session, *_ = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if int(session) == process.pid and state != "Z":
            found.append((int(folder.name), words))
    return found


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the training ranks of a started command."""
    return [
        pid
        for pid, words in session_of(process)
        if b"overtok_megatron.training.entry" in words and any(word.startswith(b"--local_rank") for word in words)
    ]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Until `condition` holds; fails where the command ends or time runs out first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early:\n{process.stdout.read() if process.stdout else ''}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)
