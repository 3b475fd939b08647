"""The supervisor with launchers that are shell commands, and ranks that are not there."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from overtok_megatron.watching.supervisor import Reached, Supervisor


@pytest.fixture
def launchers() -> Iterator[list["subprocess.Popen[bytes]"]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def send_later(number: int, seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def supervisor(
    launchers: list["subprocess.Popen[bytes]"],
    *commands: str,
    finished: bool = True,
    there_after: int = 1,
    reached: Reached = Reached.READY,
) -> tuple[Supervisor, list[int]]:
    """Starts the commands in turn. there_after: which attempt to send a signal is the first that reaches a rank.

    reached: whom it reaches.
    """
    left, sent = list(commands), []

    def start() -> "subprocess.Popen[bytes]":
        launchers.append(subprocess.Popen(["bash", "-c", left.pop(0)]))
        return launchers[-1]

    def signal_ranks(_: int, number: int) -> Reached:
        sent.append(number)
        if len(sent) < there_after:
            return Reached.NOBODY
        launchers[-1].send_signal(signal.SIGUSR2)
        return reached

    return Supervisor(start, signal_ranks, lambda: None, lambda: finished or not left), sent


LEAVES_WHEN_TOLD = "trap 'exit 143' USR2; while true; do sleep 0.05; done"


def test_a_signal_reaches_ranks_that_come_after_it(launchers: list["subprocess.Popen[bytes]"]) -> None:
    under_test, sent = supervisor(launchers, LEAVES_WHEN_TOLD, there_after=3)
    send_later(signal.SIGTERM, 0.5)
    assert under_test.run(0) == 143
    assert sent == [signal.SIGTERM] * 3


DIES = "trap 'exit 241' USR2; while true; do sleep 0.05; done"  # as DeepSpeed's launcher where SIGTERM ends a rank


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75), (signal.SIGINT, 143)])
def test_a_signal_that_ends_ranks_before_they_can_save(
    launchers: list["subprocess.Popen[bytes]"], capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    """The code is the signal's: nothing has died that a batch system should start again by itself."""
    under_test, _ = supervisor(launchers, DIES, DIES, finished=False, reached=Reached.STARTING)
    send_later(number, 0.5)
    assert under_test.run(1) == code
    said = f"asked to stop by {signal.Signals(number).name} before training began; the same command starts the run"
    assert said in capsys.readouterr().err
    assert len(launchers) == 1


def test_ranks_that_fail_while_they_save(launchers: list["subprocess.Popen[bytes]"]) -> None:
    under_test, _ = supervisor(launchers, DIES, finished=False)
    send_later(signal.SIGTERM, 0.5)
    assert under_test.run(0) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143), (signal.SIGINT, 143)])
def test_a_signal_between_two_starts(launchers: list["subprocess.Popen[bytes]"], number: int, code: int) -> None:
    under_test, _ = supervisor(launchers, "exit 1", "exit 0")

    def send_when_the_first_has_ended() -> None:
        while not launchers or launchers[0].returncode is None:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send_when_the_first_has_ended, daemon=True).start()
    assert under_test.run(1) == code
    assert len(launchers) == 1


def test_a_launcher_that_leaves_with_0_before_the_run_is_finished(launchers: list["subprocess.Popen[bytes]"]) -> None:
    under_test, _ = supervisor(launchers, "exit 0", "exit 0", finished=False)
    began = time.monotonic()
    assert under_test.run(1) == 0
    assert len(launchers) == 2 and time.monotonic() - began < 20
    again, _ = supervisor(launchers, "exit 0", "exit 0", finished=False)
    assert again.run(0) == 1
