"""What this rank is doing, told to the watchdog of its host by a thread of the rank, which also answers and leaves for it."""

import json
import os
import select
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from overtok_megatron.watching.clock import RunningClock
from overtok_megatron.watching.links import INTERVAL, encoded

T = TypeVar("T")
_OFTEN = 0.1  # seconds between beats where phases or steps change that fast
_LAST_WORDS = 1.0  # seconds that a rank which has to leave has to tell its own traceback
_READING = 10  # seconds in which a watchdog takes a message, on a busy machine
_WAIT_FOR_CAUSE = 3.0  # seconds in which the watchdog has said which rank died, if one did


class Watch:
    """What this rank does. Without `connect` nobody is told, and nothing else is different.

    under_way: returns the collectives that threads of this process are in: their names, and time.monotonic() of their begin.
    """

    def __init__(self) -> None:
        self.under_way: Callable[[], Sequence[tuple[str, float]]] = tuple
        self._clock = RunningClock()
        self._doing: tuple[str, int | None, float] = ("start", None, self._clock.now())
        self._socket: socket.socket | None = None
        self._wake: int | None = None  # an event's file descriptor, which wakes the thread
        self._last_beat = 0.0
        self._sending = threading.Lock()
        self._greeted = threading.Event()
        self._met = threading.Event()  # the watchdogs of this host and of the first
        self._told = threading.Event()
        self._exit_code = 1  # with which this rank has to leave once it is told to
        self._parting = False
        self._job_address: SimpleQueue[tuple[int, str]] = SimpleQueue()
        self._complains = False

    def phase(self, name: str, step: int | None = None) -> None:
        """Enter a phase (those of job.PHASES), or the same one anew: its time limit begins again. step: the one at work on."""
        now = self._clock.now()
        self._doing = (name, step, now)
        if self._wake is not None and now - self._last_beat > _OFTEN:
            os.eventfd_write(self._wake, 1)

    def each(self, items: Iterable[T], name: str, step: int | None = None) -> Iterator[T]:
        """`items`, with a phase of this name for the work on each."""
        for item in items:
            self.phase(name, step)
            yield item

    def connect(self, address: str, rank: int, *, complains: bool) -> None:
        """Start the thread. address: of the watchdog's socket, which may not be there yet.

        complains: this rank says it where the watchdog has gone, for all of the host.
        """
        self._complains = complains
        threading.Thread(target=self._run, args=(address, rank), name="watch", daemon=True).start()

    def job_address(self, seconds: float) -> tuple[int, str]:
        """On the first rank: the port and the token of its watchdog. Raises TimeoutError where it does not answer in time."""
        try:
            return self._job_address.get(timeout=seconds)
        except Empty:
            raise TimeoutError("the watchdog of this host did not start") from None

    def meet(self, address: str, port: int, token: str, seconds: float) -> None:
        """On another host than the first: return when the watchdogs of both know each other, and each notices the other's end.

        Raises TimeoutError where they do not in time.
        """
        if self._greeted.wait(seconds):
            self.tell("meet", address=address, port=port, token=token)
        if not self._met.wait(seconds):
            raise TimeoutError("the watchdog of this host did not meet that of the first host")

    def tell(self, kind: str, **content: Any) -> None:
        """Send a message, where there is a connection. A beat is dropped where the watchdog does not read: others follow it.

        The kernel calls a socket writable while a quarter of its buffer is in use at most. So beats leave room for what
        a rank says at its end, and a watchdog that is stopped does not keep the rank from leaving.
        """
        connection = self._socket
        if connection is not None:
            with self._sending, suppress(OSError):  # of a watchdog that has gone, the thread learns by itself
                if kind != "beat" or _reads(connection):
                    connection.sendall(encoded({"type": kind, **content}))

    def failed(self, error: BaseException) -> int | None:
        """The exit code for an error that another rank's end has caused, which is not to be printed; None for this rank's own.

        When a rank dies, the collectives of its peers raise. The traceback of such an error goes to the watchdog.
        """
        self.tell("beat", **self._beat())
        self.tell("failed")
        if self._socket is None or not self._told.wait(_WAIT_FOR_CAUSE):
            return None
        self.tell("text", text="".join(traceback.format_exception(error)))
        return self._exit_code

    @property
    def watches(self) -> bool:
        """Whether a watchdog knows of this rank."""
        return self._socket is not None

    def goodbye(self, code: int, why: str = "", *, said: bool = False) -> None:
        """Say that this rank leaves with an exit code; it must do so at once. said: a line for the user says why already."""
        self._parting = True
        self.tell("bye", code=code, why=why, said=said)

    def _run(self, address: str, rank: int) -> None:
        connection = _connected(address)
        # Not settimeout: Python would then wait, before it sends, until most of the buffer is free.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _READING, 0))
        with suppress(OSError):
            connection.sendall(encoded({"type": "hello", "rank": rank}))  # before other threads can send anything
        self._socket, self._wake = connection, os.eventfd(0)
        self._greeted.set()
        pending = b""
        while True:
            self.tell("beat", **self._beat())
            readable, _, _ = select.select([connection.fileno(), self._wake], [], [], INTERVAL)
            self._clock.tick()
            if self._wake in readable:
                os.eventfd_read(self._wake)
            if connection.fileno() not in readable:
                continue
            try:
                received = connection.recv(1 << 16)
            except OSError:
                received = b""
            if not received:
                return self._unwatched()
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                self._obey(json.loads(line))

    def _beat(self) -> dict[str, Any]:
        name, step, since = self._doing
        self._last_beat = self._clock.now()
        now = time.monotonic()
        collectives = [(what, now - begin) for what, begin in self.under_way()]
        return {"phase": name, "step": step, "seconds": self._clock.now() - since, "collectives": collectives}

    def _obey(self, message: dict[str, Any]) -> None:
        if message["type"] == "port":
            self._job_address.put((message["port"], message["token"]))
        elif message["type"] == "met":
            self._met.set()
        elif message["type"] == "stacks":
            self.tell("text", text=stacks())
        elif message["type"] == "leave":
            self._exit_code = message["code"]
            self._told.set()
            time.sleep(_LAST_WORDS)
            if not self._parting:
                os._exit(self._exit_code)

    def _unwatched(self) -> None:
        """The watchdog has gone, though it outlives its ranks: nobody would end them, or learn of their end, any more."""
        if self._parting:
            return
        if self._complains:
            line = f"the watchdog of {socket.gethostname()} has gone: the ranks of this host leave"
            print(f"{time.strftime('%H:%M:%S')} [watch] {line}", file=sys.stderr, flush=True)
        os._exit(1)


def stacks() -> str:
    """The Python stacks of all threads of this process but the one that calls this; the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != threading.main_thread().ident)
    return "\n".join(
        f"thread {names.get(ident, 'of a library')}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident != threading.get_ident()
    )


def _reads(connection: socket.socket) -> bool:
    """Whether the other end reads what is sent, so that there is room for more."""
    poll = select.poll()  # select knows file descriptors below 1024 alone
    poll.register(connection, select.POLLOUT)
    return bool(poll.poll(0))


def _connected(address: str) -> socket.socket:
    """A connection to the watchdog, as soon as it listens."""
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(address)
        except OSError:
            connection.close()
            time.sleep(0.1)
        else:
            return connection
