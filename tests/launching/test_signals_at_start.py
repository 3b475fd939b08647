"""A command that is told to end while its ranks come up: its exit code, its line, and what is left of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from overtok_megatron.launching.local import ENTRY, signal_ranks
from overtok_megatron.training import entry
from overtok_megatron.watching.supervisor import Reached
from support.overtok_process import kill_session, ranks_of, session_of, start_overtok, wait_for
from support.started_ranks import plain_environment
from support.workspace import Workspace

HANDLES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
RANK = "import signal, sys; {}print(flush=True); signal.pause()"


@pytest.fixture
def launcher() -> Iterator["subprocess.Popen[bytes]"]:
    """A shell whose children a test starts by lines on its standard input."""
    process = subprocess.Popen(["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield process
    for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
        child.kill()
    process.kill()
    process.communicate()


def start_rank(launcher: "subprocess.Popen[bytes]", code: str) -> None:
    assert launcher.stdin is not None and launcher.stdout is not None
    launcher.stdin.write(f"{sys.executable} -c '{code}' {ENTRY} --local_rank=0 &\n".encode())
    launcher.stdin.flush()
    assert launcher.stdout.readline() == b"\n"


def test_whom_a_signal_reaches(launcher: "subprocess.Popen[bytes]") -> None:
    assert signal_ranks(launcher.pid, signal.SIGTERM) is Reached.NOBODY
    start_rank(launcher, RANK.format(HANDLES))
    assert signal_ranks(launcher.pid, signal.SIGTERM) is Reached.READY


@pytest.mark.parametrize("codes", [("", HANDLES), (HANDLES, "")])
def test_one_rank_that_cannot_save_is_enough(launcher: "subprocess.Popen[bytes]", codes: tuple[str, str]) -> None:
    for code in codes:
        start_rank(launcher, RANK.format(code))
    assert signal_ranks(launcher.pid, signal.SIGTERM) is Reached.STARTING


def test_sigkill_ends_a_launcher_that_has_no_rank_so_far(launcher: "subprocess.Popen[bytes]") -> None:
    """Else it would start ranks whose command has gone."""
    assert launcher.stdin is not None
    launcher.stdin.write(b"bash -c 'sleep 600; true' & echo\n")
    launcher.stdin.flush()
    assert launcher.stdout is not None and launcher.stdout.readline() == b"\n"
    below = psutil.Process(launcher.pid).children(recursive=True)
    assert below
    signal_ranks(launcher.pid, signal.SIGKILL)
    launcher.wait(timeout=10)
    gone, alive = psutil.wait_procs(below, timeout=10)
    assert gone and not alive


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers of signals that a rank sets are taken away again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_rank_that_is_told_to_leave_before_it_trains_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    def prepare(*_: Any, joined: Callable[[], None], **__: Any) -> None:
        joined()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(os, "environ", plain_environment())
    monkeypatch.setattr(entry, "prepare_rank", prepare)
    assert entry.main(["run.yaml"]) == code
    assert capsys.readouterr().err == (
        f"asked to stop by {number.name} before training began; the same command starts the run (exit code {code})\n"
    )


def test_sigterm_as_soon_as_a_rank_is_there(workspace: Workspace) -> None:
    """It dies of the signal, or leaves by its own handler; both are told by one line and the signal's code."""
    process = start_overtok("train", workspace.config("run"), "--max-restarts", 2, env=plain_environment())
    try:
        wait_for(lambda: bool(ranks_of(process)), process)
        os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=100)
    finally:
        kill_session(process)
    assert process.returncode == 143, output
    assert output.count("asked to stop by SIGTERM before training began; the same command starts the run") == 1, output
    assert "Traceback" not in output


def test_ctrl_c_twice_before_there_is_a_rank(workspace: Workspace) -> None:
    process = start_overtok("train", workspace.config("run"), env=plain_environment())
    try:
        wait_for(
            lambda: any(b"--no_local_rank" in words or b"--module" in words for _, words in session_of(process)),
            process,
        )
        for _ in range(2):
            os.kill(process.pid, signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.01)
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 130, output
        assert not session_of(process)
    finally:
        kill_session(process)
