"""Where the ranks of a run meet before there is a process group: a store that the first rank, or torchrun, keeps.

A user's mistake found by the first rank ends all ranks by one line, and not by one per rank. The store is that of the process
group, which finds it again under the same address and port (rendezvous.py).
"""

import json
import socket
import time
from datetime import timedelta
from typing import Any

from overtok_megatron.errors import ConfigError, OvertokError
from overtok_megatron.launching.hosts import addresses_of, is_own_address
from overtok_megatron.placement import Placement

# Seconds. Ranks come as their hosts get them started and import torch; the first rank compiles kernels and opens the data.
JOIN_LIMIT, CHECK_LIMIT, ANSWER_LIMIT = 600.0, 3600.0, 600.0
_NAME_LIMIT = 60.0  # names of pods are known a while after the pods
_START, _ANSWER, _VERDICT, _GONE, _SAID = "start", "answer", "verdict", "gone", "said"
_FAILED = "failed with code"


class AlreadySaidError(OvertokError):
    """Another rank has told the user what is wrong; this one leaves with `code` and says nothing."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class NotMetError(Exception):
    """The ranks did not come together: a host or a rank is missing, which is not a mistake in the configuration."""


class Meeting:
    """The store of one start of a run; every rank makes one and joins it."""

    def __init__(self, place: Placement, *, join_limit: float = JOIN_LIMIT) -> None:
        """join_limit: seconds until all ranks must have come."""
        self.place = place
        self._join_limit = join_limit
        self._store: Any = None

    @property
    def is_first(self) -> bool:
        return self.place.rank == 0

    def join(self) -> None:
        """Return when all ranks have joined, or a client of the store at least has connected; RANK and MASTER_ADDR are set.

        Raises ConfigError where the address or the port cannot serve, NotMetError where ranks are missing in the end.
        """
        from torch.distributed import PrefixStore

        from overtok_megatron.training.rendezvous import store_of_start

        place, meet = self.place, f"{self.place.master_address}:{self.place.master_port}"
        self._check_address()
        try:
            limit = timedelta(seconds=self._join_limit)
            store, _, _ = store_of_start(place.attempt, limit, rank=place.rank, world_size=place.world_size)
        except RuntimeError as error:  # torch's errors of networks and stores are of this kind
            if "EADDRINUSE" in str(error):
                raise ConfigError(
                    f"MASTER_PORT: {place.master_port} is in use on {socket.gethostname()}, the host of rank 0; set another one"
                ) from None
            if self.is_first:
                raise NotMetError(
                    f"not all of the {place.world_size} ranks came to {meet} within {self._join_limit:.0f} s; see which host "
                    f"started none, and whether it reaches {place.master_address}"
                ) from error
            raise NotMetError(
                f"the first rank was not reached at {meet} from {socket.gethostname()} within {self._join_limit:.0f} s; "
                "MASTER_ADDR must be the host of rank 0, and the port must be open between the hosts"
            ) from error
        self._store = PrefixStore("meeting", store)

    def _check_address(self) -> None:
        """Raise ConfigError where the address has no meaning here, or is not that of the first rank's host."""
        place, deadline = self.place, time.monotonic() + _NAME_LIMIT
        while True:
            if found := addresses_of(place.master_address):
                break
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"MASTER_ADDR: {place.master_address!r} is not known on {socket.gethostname()}; set it to a name or an "
                    "address of the host of rank 0"
                )
            time.sleep(1.0)
        if self.is_first and not place.master_given and not any(map(is_own_address, found)):
            raise ConfigError(
                f"MASTER_ADDR: not set, and {place.started_by} names {place.master_address}, but rank 0 runs on "
                f"{socket.gethostname()}; set it to that host"
            )

    @property
    def store(self) -> Any:
        """The store of torch.distributed, for others of this start that meet. Call `join` before."""
        assert self._store is not None, "the ranks have not met"
        return self._store

    def begin(self, told: dict[str, Any]) -> None:
        """On the first rank: tell the others what they answer to."""
        self._store.set(_START, json.dumps(told))

    def wait_for_beginning(self) -> dict[str, Any]:
        """On the others: what the first rank tells. Raises AlreadySaidError where it found a mistake, and NotMetError."""
        return self._wait(_START, CHECK_LIMIT)

    def answer(self, facts: dict[str, Any]) -> None:
        """On the others: answer, and return once the first rank has passed all answers. Raises as wait_for_beginning."""
        self._store.set(f"{_ANSWER}/{self.place.rank}", json.dumps(facts))
        self._wait(_VERDICT, 2 * ANSWER_LIMIT)

    def answers(self) -> list[dict[str, Any]]:
        """On the first rank: the answers of ranks 1 to N - 1, in their order. Raises NotMetError where one is missing."""
        deadline = time.monotonic() + ANSWER_LIMIT
        found = []
        for rank in range(1, self.place.world_size):
            key = f"{_ANSWER}/{rank}"
            if not self._arrives(key, deadline):
                raise NotMetError(f"rank {rank} came, but left or did not answer within {ANSWER_LIMIT:.0f} s")
            found.append(json.loads(self._store.get(key)))
        return found

    def go_on(self) -> None:
        """On the first rank: let the others go on."""
        self._store.set(_VERDICT, json.dumps({}))

    def leave(self, code: int, *, linger: float = 5.0) -> None:
        """End by a failure; the first rank ends those that still wait for it, and keeps the store until they know, at most
        `linger` seconds."""
        if self._store is None:
            return
        try:
            if self.is_first:
                for key in (_START, _VERDICT):
                    self._store.set(key, json.dumps({_FAILED: code}))
            gone, deadline = self._store.add(_GONE, 1), time.monotonic() + linger
            while self.is_first and gone < self.place.world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                gone = self._store.add(_GONE, 0)
        except RuntimeError:  # the store is gone
            return

    def is_news(self, text: str) -> bool:
        """Whether no rank has said this before; it counts as said then. All that is said is news where the store is gone."""
        try:
            return self._store is None or self._store.add(f"{_SAID}/{text}", 1) == 1
        except RuntimeError:
            return True

    def _wait(self, key: str, limit: float) -> dict[str, Any]:
        silent = f"the first rank, at {self.place.master_address}, left before training began, or was silent for {limit:.0f} s"
        try:
            if not self._arrives(key, time.monotonic() + limit):
                raise NotMetError(silent)
            told: dict[str, Any] = json.loads(self._store.get(key))
        except RuntimeError as error:
            raise NotMetError(silent) from error
        if _FAILED in told:
            raise AlreadySaidError(told[_FAILED])
        return told

    def _arrives(self, key: str, deadline: float) -> bool:
        """Whether a key is there before the deadline; on the first rank also only as long as no other rank has left.

        Asks again and again, so that signals are handled meanwhile: the store's own wait does not return to Python.
        """
        pause = 0.01
        while not self._store.check([key]):
            if time.monotonic() > deadline or (self.is_first and self._store.add(_GONE, 0)):
                return False
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        return True
