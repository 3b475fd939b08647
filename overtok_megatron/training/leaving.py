"""Why a run leaves before its end, and with which exit code: signals, the file STOP in its folder, and a limit of minutes.

All of them let the step in progress end and save it. The ranks decide together, in the one reduction of a step; who asked,
and for what, they tell each other only then.
"""

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.training.exit_codes import START_AGAIN, TERMINATED

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0  # between two looks for the file STOP, which cost a round trip on a network file system


@dataclass(frozen=True)
class Departure:
    """Why a run leaves early, in words that follow "asked to stop by", and the exit code of its ranks."""

    reason: str
    exit_code: int


class Leaving:
    """What asks this rank to leave. The first rank alone looks at the file and at the clock.

    A signal during what follows in the start is not lost: the run then leaves after its first step. minutes: of the life of the
    first rank's process, after which the run leaves; None = no limit.
    """

    def __init__(self, grid: ProcessGrid, folder: RunFolder, minutes: float | None) -> None:
        self._grid = grid
        self._stop_file = folder.stop
        self._minutes = minutes
        self._looked = -_LOOK_SECONDS
        self._departure: Departure | None = None
        # Called in a signal's handler: the step in progress may say it.
        self.signalled: Callable[[], None] | None = None
        # The start by the system's clock, which may be set meanwhile, is read once.
        self._born = time.monotonic() - max(0.0, time.time() - psutil.Process(os.getpid()).create_time())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def asked(self) -> bool:
        """Whether this rank was asked to leave; on the first rank after a look at the clock and, once per second, the file."""
        if self._departure is None and self._grid.rank == 0:
            self._departure = self._by_clock() or self._by_file()
        return self._departure is not None

    def agree(self) -> Departure | None:
        """The departure that all ranks agree on: to stop counts before to start again, then the first rank's.

        All ranks must call this. None where no rank was asked.
        """
        found = [departure for departure in self._grid.gather_objects(self._departure) if departure is not None]
        return min(found, key=lambda departure: departure.exit_code != TERMINATED, default=None)

    def tidy(self) -> None:
        """Remove the file STOP, on the first rank, when the run has ended or left: the next start would stop at once."""
        if self._grid.rank > 0:
            return
        try:
            self._stop_file.unlink(missing_ok=True)
        except OSError as error:
            log.warning(
                "%s: cannot be removed (%s); remove it, or the next start stops after a step", self._stop_file, error
            )

    def _on_signal(self, number: int, _: object) -> None:
        """SIGTERM and SIGUSR1, or Ctrl-C once: a second Ctrl-C interrupts at once."""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = START_AGAIN if number == signal.SIGUSR1 else TERMINATED
        if self._departure is None or code == TERMINATED:
            self._departure = Departure(f"{signal.Signals(number).name} on rank {self._grid.rank}", code)
        if self.signalled is not None:
            self.signalled()

    def _by_clock(self) -> Departure | None:
        if self._minutes is None or time.monotonic() - self._born < 60.0 * self._minutes:
            return None
        return Departure(f"training.exit_after_minutes, which is {self._minutes:g}", START_AGAIN)

    def _by_file(self) -> Departure | None:
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return None
        self._looked = time.monotonic()
        with suppress(OSError):  # a file system that does not answer for a moment is asked again
            if self._stop_file.exists():
                return Departure(f"the file {self._stop_file}, which is removed now", START_AGAIN)
        return None
