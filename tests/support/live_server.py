"""A server on a free port, in a thread of the test's process."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import uvicorn

from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.speculation import Speculation
from overtok_megatron.serving.app import ServerSettings, build_app
from overtok_megatron.serving.requests import Limits
from overtok_megatron.serving.server import open_socket, server_config

SETTINGS = ServerSettings(model="tiny", max_body=5000, seconds=60.0, body_seconds=1.0, hosts=("127.0.0.1", "localhost"))


@dataclass(frozen=True)
class LiveServer:
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/health").json()

    def post(self, **request: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={"model": "tiny", **request}, timeout=60)

    def wait_idle(self, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        idle = {"status": "ok", "running": 0, "waiting": 0}
        while not (load := self.health()).items() >= idle.items():
            assert time.monotonic() < deadline, load
            time.sleep(0.02)


@contextlib.contextmanager
def live_server(
    trained: TrainedModel,
    *,
    max_batch: int = 4,
    max_waiting: int = 40,
    prefill_chunk: int = 7,
    connections: int = 100,
    speculation: Speculation | None = None,
    **settings: Any,
) -> Iterator[LiveServer]:
    limits = Limits(trained.config.data.seq_length, 40, 8)
    bounds = {"max_batch": max_batch, "max_waiting": max_waiting, "prefill_chunk": prefill_chunk}
    app = build_app(trained, replace(SETTINGS, **settings), limits, **bounds, speculation=speculation)
    with open_socket("127.0.0.1", 0) as listening:
        server = uvicorn.Server(server_config(app, connections))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield LiveServer(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()
