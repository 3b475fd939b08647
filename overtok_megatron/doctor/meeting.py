"""How the ranks talk while links are in doubt: over a store alone, in steps that the first rank leads, each with a time limit.

In a step every rank says a value, the first rank gathers those that come in time, decides, and all hear the decision and who
was not heard. A rank that misses a step is left out from then on, so one broken host costs the time of one step. Values are
JSON.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

T = TypeVar("T")
PINGS = 8
_GRACE = 30.0  # seconds that a rank waits for the first one beyond a step's limit
_PING_SECONDS = 5.0  # for all pings of a host
_STORE_ERRORS = (RuntimeError, OSError)  # torch's DistError is a RuntimeError; TimeoutError an OSError


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; raises TimeoutError where it has not ended in time, and leaves it to a daemon thread.

    A client of a store whose process is stopped waits for ever, whatever its own time limit is.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # of any kind: the caller raises it
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(seconds)


class MeetingLostError(Exception):
    """This rank cannot go on: the first rank is not reached, or has gone on without this one. The text is for the user."""


@dataclass(frozen=True)
class ClockOffset:
    """How far a clock is ahead of the first host's, in seconds, and how wrong that can be: half the round trip."""

    seconds: float
    error: float


def estimate_offset(pings: Sequence[tuple[float, float, float]]) -> ClockOffset:
    """The offset by (asked, told, heard): the other clock told its time between the two moments of ours.

    Taken is the ping with the shortest round trip; half of that bounds the error, whichever way took longer. As NTP does.
    """
    asked, told, heard = min(pings, key=lambda ping: ping[2] - ping[0])
    return ClockOffset(told - (asked + heard) / 2, (heard - asked) / 2)


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the store is. served: somebody else, such as torchrun, has opened it; otherwise the first rank does."""

    host: str
    port: int
    served: bool

    @property
    def loopback(self) -> bool:
        """Whether only processes of this machine can reach it."""
        return self.host == "localhost" or self.host == "::1" or self.host.startswith("127.")

    def open(self, *, first: bool, seconds: float) -> Store:
        """The store, opened by the first rank, joined by others. Raises MeetingLostError where it is not reached in time."""

        def connect() -> Store:
            return TCPStore(
                self.host,
                self.port,
                is_master=first and not self.served,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )

        try:
            store = within(seconds + _GRACE, connect)
        except _STORE_ERRORS as error:
            if first and not self.served:
                reason = str(error).strip().splitlines()[0]
                raise MeetingLostError(
                    f"port {self.port} of this host cannot be opened ({reason}); name a free one"
                ) from None
            raise MeetingLostError(
                f"no answer from {self.host}:{self.port}, where the first rank listens, within {seconds:.0f} s; is its host "
                "up, and does a firewall close the port?"
            ) from None
        return PrefixStore("overtok_doctor", store)


class Meeting:
    """The steps of one rank; all ranks take the same steps in the same order.

    members: ranks that have answered so far. silent: those that have not, with the step that they missed and its limit in
    seconds; known to the first rank only.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store = store
        self._rank = rank
        self.members = list(range(world))
        self.silent: dict[int, tuple[str, float]] = {}
        self._begun = time.monotonic()
        self._step = 0

    def step(self, name: str, value: Any, seconds: float, decide: Callable[[dict[int, Any]], T]) -> T:
        """Say `value`; returns on every rank what `decide` returns on the first one for the values of those who spoke in time.

        seconds: how long a rank may take since the last step ended. name: what the report calls the step. Raises
        MeetingLostError on a rank that was too late, or where the first rank does not answer.
        """
        self._step += 1
        key = f"step{self._step}"
        if self._rank == 0:
            values = {0: value, **self._hear(key, seconds)}
            for rank in self.members:
                if rank not in values:
                    self.silent[rank] = (name, seconds)
            decision = json.dumps([sorted(values), decide(values)])
            self._store.set(f"{key}/decision", decision)
        else:
            decision = self._say(key, value, seconds, name)
        self.members, decided = json.loads(decision)
        if self._rank not in self.members:
            raise MeetingLostError(
                f"this rank took longer than {seconds:.0f} s for {name}; the others went on without it"
            )
        self._begun = time.monotonic()
        return decided

    def _hear(self, key: str, seconds: float) -> dict[int, Any]:
        """The values of the other members that come before the step's limit, by rank."""
        values = {}
        for rank in self.members[1:]:
            left = self._begun + seconds - time.monotonic()
            try:
                # one that has answered is heard also where those before it have used up the time
                self._store.wait([f"{key}/{rank}"], timedelta(seconds=max(left, 0.01)))
                values[rank] = json.loads(self._store.get(f"{key}/{rank}"))
            except _STORE_ERRORS:
                continue
        return values

    def _say(self, key: str, value: Any, seconds: float, name: str) -> str:
        limit = seconds + _GRACE
        try:
            return within(limit + _GRACE, lambda: self._exchange(key, value, limit))
        except _STORE_ERRORS:
            raise MeetingLostError(f"the first rank did not answer within {limit:.0f} s ({name})") from None

    def _exchange(self, key: str, value: Any, seconds: float) -> str:
        self._store.set(f"{key}/{self._rank}", json.dumps(value))
        self._store.wait([f"{key}/decision"], timedelta(seconds=seconds))
        return self._store.get(f"{key}/decision").decode()

    def farewell(self) -> None:
        """Wait, shortly, until all have heard the last decision: the first rank's process may hold the store."""
        with suppress(*_STORE_ERRORS):
            if self._rank:
                within(_PING_SECONDS, lambda: self._store.set(f"farewell/{self._rank}", ""))
            else:
                self._store.wait([f"farewell/{rank}" for rank in self.members[1:]], timedelta(seconds=_PING_SECONDS))

    def clocks(self, leaders: Sequence[int]) -> Mapping[int, ClockOffset]:
        """On the first rank: how far the clocks of `leaders`, one rank per host, are ahead of its own; wrong on other ranks.

        A leader that does not answer the pings is left out. The hosts are asked one after the other, so that no answer waits
        for another's.
        """
        found = {0: ClockOffset(0.0, 0.0)}
        asked = [rank for rank in leaders if rank != 0]
        if self._rank == 0:
            for rank in asked:
                pings = self._ping(rank)
                if pings:
                    found[rank] = estimate_offset(pings)
        elif self._rank in asked:
            limit = len(asked) * _PING_SECONDS + _GRACE
            with suppress(*_STORE_ERRORS):  # the first rank has gone on, or has gone; the next step says so
                within(limit, lambda: self._answer_pings(limit))
        self.step("the clocks", None, len(asked) * _PING_SECONDS + _GRACE, lambda _: None)
        return found

    def _ping(self, rank: int) -> list[tuple[float, float, float]]:
        end = time.monotonic() + _PING_SECONDS
        pings: list[tuple[float, float, float]] = []
        for turn in range(PINGS):
            asked = time.time()
            self._store.set(f"ping/{rank}/{turn}", "")
            try:
                self._store.wait([f"pong/{rank}/{turn}"], timedelta(seconds=max(end - time.monotonic(), 0.01)))
            except _STORE_ERRORS:
                break
            heard = time.time()
            pings.append((asked, float(self._store.get(f"pong/{rank}/{turn}")), heard))
        return pings

    def _answer_pings(self, seconds: float) -> None:
        for turn in range(PINGS):
            self._store.wait([f"ping/{self._rank}/{turn}"], timedelta(seconds=seconds))
            self._store.set(f"pong/{self._rank}/{turn}", repr(time.time()))
