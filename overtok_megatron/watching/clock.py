"""A clock that stands still while its process does."""

import time

_LONGEST_GAP = 5.0  # seconds between two ticks that a process on a busy machine may need


class RunningClock:
    """Seconds during which this process could run; `tick` must be called about once per second.

    A batch system may stop all processes of a job for hours and let them go on. No rank hangs then: a longer gap between two
    ticks does not count.
    """

    def __init__(self) -> None:
        self._away = 0.0
        self._last_tick = time.monotonic()

    def tick(self) -> None:
        """Note that this process runs now."""
        now = time.monotonic()
        if now - self._last_tick > _LONGEST_GAP:
            self._away += now - self._last_tick
        self._last_tick = now

    def now(self) -> float:
        return time.monotonic() - self._away
