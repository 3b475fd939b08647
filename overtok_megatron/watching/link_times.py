"""How long messages travel between the first host's watchdog and the others: a host behind a slow link is named.

A slow link makes the ranks at both its ends wait, so that none of them is late to the others. The watchdogs exchange a message
per second in any case; the others send each message of the first host back at once. The fastest of the last messages counts: a
busy host answers late now and then, but over a slow link every message is late.
"""

import socket
from collections import deque
from collections.abc import Callable

SLOW = 0.02  # seconds there and back; within one cluster it is less than a thousandth
_MESSAGES = 20


class LinkTimes:
    """Takes the time of each message that came back, and says when a link is slow, and when it is no longer slow."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._recent: dict[str, deque[float]] = {}
        self._slow: set[str] = set()

    def heard(self, host: str, seconds: float) -> None:
        """A message to a host and back took so long."""
        recent = self._recent.setdefault(host, deque(maxlen=_MESSAGES))
        recent.append(seconds)
        if len(recent) < _MESSAGES:
            return
        best, here = min(recent), socket.gethostname()
        if host not in self._slow and best >= SLOW:
            self._slow.add(host)
            self._say(
                f"the link between {here} and {host} is slow: of {_MESSAGES} messages from {here} (rank 0) to {host} "
                f"and back the fastest took {1000 * best:.0f} ms; overtok doctor measures the links between all hosts"
            )
        elif host in self._slow and best < SLOW / 2:
            self._slow.discard(host)
            self._say(f"the link between {here} and {host} is no longer slow: {1000 * best:.1f} ms there and back")
