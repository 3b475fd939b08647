"""Starts a job, passes signals on to its ranks, and starts the job again where it fails."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from enum import Enum
from types import FrameType

# Finished; a mistake that would come again; stopped early, and to be started again by whoever stopped it; Ctrl-C; SIGTERM.
FINAL = (0, 2, 75, 130, 143)
_CODES: dict[int, int] = {
    signal.SIGUSR1: 75,
    signal.SIGINT: 143,
    signal.SIGTERM: 143,
    signal.SIGHUP: 143,
}  # of the signals passed on
FAILED = 1  # whatever else a launcher makes of the codes and signals by which its ranks ended
_LONGEST_PAUSE = 60.0  # seconds before a start


def line_before_training(number: int, code: int) -> str:
    """What is said where a signal ends a run that has not begun to train. code: the exit code."""
    name = signal.Signals(number).name
    return f"asked to stop by {name} before training began; the same command starts the run (exit code {code})"


class Reached(Enum):
    """Whom a signal has reached: no rank; ranks of which one at least cannot save yet and dies of it; ranks that can save."""

    NOBODY = "nobody"
    STARTING = "starting"
    READY = "ready"


class Supervisor:
    """Runs one launcher after the other, each in a process group of its own, so that Ctrl-C reaches this process alone.

    start: starts the launcher. signal_ranks(launcher's process id, signal): sends a signal to ranks, and says whom it reached;
    SIGKILL also keeps ranks from being started. wait_until_gone: returns when no rank holds the run any more. finished:
    whether the run has come to its end: DeepSpeed's launcher leaves with 0 also where a signal has ended what it started.
    """

    def __init__(
        self,
        start: Callable[[], "subprocess.Popen[bytes]"],
        signal_ranks: Callable[[int, int], Reached],
        wait_until_gone: Callable[[], None],
        finished: Callable[[], bool],
    ) -> None:
        self._start = start
        self._signal_ranks = signal_ranks
        self._wait_until_gone = wait_until_gone
        self._finished = finished
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped: int | None = None  # the signal that asked for the end
        self._to_send: int | None = None  # a signal that no rank has got so far
        self._cut_short = False  # the signal has ended a rank that had not begun to train
        self._interrupted = False  # by a second Ctrl-C

    def run(self, max_restarts: int) -> int:
        """Start the job, and again after each failure, `max_restarts` times in all; returns the exit code of the last start.

        The ranks go on from the run's last complete checkpoint by themselves. Progress does not earn further restarts.
        Raises KeyboardInterrupt after a second Ctrl-C, when the ranks have gone.
        """
        before = {number: signal.getsignal(number) for number in _CODES}
        for number in before:
            if before[number] is not signal.SIG_IGN:  # as nohup ignores SIGHUP
                signal.signal(number, self._pass_on)
        try:
            for restarts in range(max_restarts + 1):
                self._process = self._start()
                code = self._wait(self._process)
                self._process = None
                if code == 0 and not self._finished():
                    code = FAILED
                if code != 0:
                    self._wait_until_gone()
                if self._interrupted:
                    raise KeyboardInterrupt
                if code in FINAL:
                    return code
                if self._stopped is not None and self._cut_short:
                    code = _CODES[self._stopped]
                    _say(line_before_training(self._stopped, code))
                    return code
                if self._stopped is not None or restarts == max_restarts:
                    return FAILED
                pause = min(_LONGEST_PAUSE, 2.0**restarts)
                _say(
                    f"start {restarts + 1} of at most {max_restarts + 1} ended with code {code}, and its ranks have gone; the "
                    f"next one, from the last complete checkpoint, in {pause:.0f} s"
                )
                self._pause(pause)
                if self._stopped is not None:
                    return _CODES[self._stopped]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        raise AssertionError("the last start returns")

    def _wait(self, process: "subprocess.Popen[bytes]") -> int:
        """The launcher's exit code. A signal that came before the ranks did is sent to them when they are there."""
        while True:
            try:
                return process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                self._send(process)

    def _send(self, process: "subprocess.Popen[bytes]") -> None:
        if self._to_send is None:
            return
        reached = self._signal_ranks(process.pid, self._to_send)
        if reached is not Reached.NOBODY:
            self._to_send = None
        self._cut_short |= reached is Reached.STARTING

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._stopped is None and time.monotonic() < deadline:
            time.sleep(0.1)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """Ask the ranks to save and leave; at a second Ctrl-C end them."""
        self._interrupted = number == signal.SIGINT and self._stopped == signal.SIGINT
        self._stopped = number
        if self._interrupted:
            number = signal.SIGKILL
        elif number != signal.SIGUSR1:
            number = signal.SIGTERM  # a rank takes both as a request to save; a second SIGINT would cut its save short
        self._to_send = number
        if self._process is None:
            return
        self._send(self._process)
        if self._interrupted:
            self._process.terminate()  # DeepSpeed's launcher then ends what it started, on other hosts, too


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} [supervisor] {line}", file=sys.stderr, flush=True)
