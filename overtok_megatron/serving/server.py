"""The server process: uvicorn with limits on connections, headers and waiting times, until a signal ends it."""

import asyncio
import ipaddress
import signal
import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from overtok_megatron.errors import InputError

_HEADER_BYTES = 1 << 14
_HEADER_SECONDS = 10.0
_SHUTDOWN_SECONDS = 10


class ImpatientProtocol(H11Protocol):
    """Closes a connection whose request line and headers do not arrive in time; uvicorn itself would wait forever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        """Run a timer from the moment when no request is being answered until the next one has arrived."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(_HEADER_SECONDS, self._expire)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises InputError where the address cannot be listened on."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # IPPROTO_TCP by name: only then does asyncio switch off Nagle's delay, 40 ms per token
        listening = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)  # clients that connect while the server starts wait
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror or error}); name another"
        ) from None
    return listening


def server_config(app: Starlette, connections: int) -> uvicorn.Config:
    """uvicorn's settings, with every limit that it has."""
    return uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        lifespan="on",
        limit_concurrency=connections,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="warning",
    )


def serve(config: uvicorn.Config, listening: socket.socket) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish the requests in progress (for at most ten seconds) and return."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # uvicorn handles both while it runs, and raises them again at its end
    with listening:
        uvicorn.Server(config).run(sockets=[listening])
