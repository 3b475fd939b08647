"""Messages between ranks, watchdogs and the first host's watchdog: one JSON object per line, with its kind under `type`.

| from | to | type | what it holds |
| --- | --- | --- | --- |
| rank | its watchdog | `hello` | rank |
| | | `beat` | step, phase, seconds in it, collectives under way with their seconds |
| | | `text` | its stacks, or the traceback of an error that another rank caused |
| | | `failed` | nothing: the rank has an error, and asks whether another rank caused it |
| | | `bye` | exit code, and why |
| | | `meet` | address, port and token of the first host's watchdog |
| | | `all come` | nothing: the first rank says that every rank has agreed to begin |
| watchdog | its ranks | `port` | port and token under which other watchdogs reach this one; to the first rank |
| | | `met` | nothing: the first host's watchdog has this host's first report |
| | | `stacks`, `leave` | a request for stacks; exit code with which to leave at once |
| watchdog | the first host's | `hello` | token; a report follows at once |
| | | `report` | the watchdog's name, host, state of each of its ranks |
| | | `text`, `failed` | rank, text; as from ranks |
| | | `back` | when an `alive` was sent, at once when it comes |
| the first host's | watchdogs | `alive`, `met`, `stacks`, `leave` | a sign of life, and when it was sent; as to ranks |
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from overtok_megatron.watching.clock import RunningClock

Message = dict[str, Any]
LONGEST = 1 << 26  # bytes of a line
INTERVAL = 1.0  # seconds between beats, reports and signs of life
LOST_AFTER = 20.0  # seconds of silence after which a host counts as lost
_CONNECTING = 5.0  # seconds


def encoded(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def listening_socket() -> socket.socket:
    """A socket on a free port of this host, over IPv6 and IPv4 where it has both: asyncio would take a port for each."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    """What arrives, until the connection ends or something else than a message comes."""
    while True:
        try:
            line = await reader.readline()
            message = json.loads(line)
        except (OSError, ValueError):  # the last, empty line is not JSON either
            return
        if not isinstance(message, dict) or "type" not in message:
            return
        yield message


class JobLink:
    """A host's connection to the watchdog of the first host. It is made again where it breaks."""

    def __init__(
        self,
        address: str,
        port: int,
        token: str,
        *,
        clock: RunningClock,
        obey: Callable[[Message], None],
        report: Callable[[], Message],
    ) -> None:
        """obey: called with each order from the first host. report: what this host tells it as soon as it is connected."""
        self._clock = clock
        self._obey = obey
        self._report = report
        self._heard = clock.now()
        self._writer: asyncio.StreamWriter | None = None
        self._task = asyncio.create_task(self._run(address, port, token))

    @property
    def broken(self) -> bool:
        return self._writer is None

    def silence(self) -> float:
        """Seconds since the first host's watchdog was heard."""
        return self._clock.now() - self._heard

    def send(self, message: Message) -> None:
        """Send a message, or drop it where there is no connection: reports come again."""
        if self._writer is not None:
            self._writer.write(encoded(message))

    async def close(self) -> None:
        """Close the connection when what was sent has been handed to the system."""
        self._task.cancel()
        if self._writer is not None:
            self._writer.close()
            with suppress(OSError, TimeoutError):
                await asyncio.wait_for(self._writer.wait_closed(), _CONNECTING)

    async def _run(self, address: str, port: int, token: str) -> None:
        while True:
            with suppress(OSError, TimeoutError):
                connecting = asyncio.open_connection(address, port, limit=LONGEST)
                reader, writer = await asyncio.wait_for(connecting, _CONNECTING)
                self._writer = writer
                writer.write(encoded({"type": "hello", "token": token}) + encoded(self._report()))
                async for message in messages(reader):
                    self._heard = self._clock.now()
                    if "sent" in message:
                        writer.write(encoded({"type": "back", "sent": message["sent"]}))
                    self._obey(message)
                writer.close()
            self._writer = None
            await asyncio.sleep(INTERVAL / 2)
