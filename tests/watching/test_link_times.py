"""A host behind a slow link is named, by the messages that the watchdogs exchange in any case."""

import asyncio
import contextlib
import socket
import time
from pathlib import Path

import pytest

from overtok_megatron.watching import link_times
from overtok_megatron.watching.clock import RunningClock
from overtok_megatron.watching.link_times import LinkTimes
from overtok_megatron.watching.links import JobLink
from overtok_megatron.watching.watchdog import HostWatch, Settings


def test_the_fastest_message_counts_and_a_line_is_said_once() -> None:
    said: list[str] = []
    links = LinkTimes(said.append)
    for _ in range(50):
        links.heard("beta", 0.05)
        links.heard("gamma", 0.0004)
        links.heard("delta", 0.3)
        links.heard("delta", 0.001)  # busy now and then
    (line,) = said
    assert line.startswith(f"the link between {socket.gethostname()} and beta is slow: of 20 messages")
    assert "the fastest took 50 ms" in line
    assert len(line) <= 300
    for _ in range(20):
        links.heard("beta", 0.0005)
    assert said[1:] == [f"the link between {socket.gethostname()} and beta is no longer slow: 0.5 ms there and back"]


async def delayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Hand bytes on, each some seconds after it came."""
    loop = asyncio.get_running_loop()
    while data := await reader.read(1 << 16):
        loop.call_later(seconds, writer.write, data)


@pytest.mark.parametrize("delay", [0.0, 0.03])
def test_two_watchdogs_notice_a_link_that_delays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], delay: float
) -> None:
    """Between them is a relay that holds each byte back for 30 ms in both directions."""

    async def both() -> None:
        settings = Settings(listener=-1, ranks=2, host_ranks=1, first=True, folder=str(tmp_path), hang_timeout=None)
        first = HostWatch(settings)
        server = await asyncio.start_server(first._serve_host, "127.0.0.1", 0)

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
            await asyncio.gather(delayed(reader, far_writer, delay), delayed(far_reader, writer, delay))

        between = await asyncio.start_server(relay, "127.0.0.1", 0)
        port = between.sockets[0].getsockname()[1]
        report = {"type": "report", "watchdog": "w", "host": "beta", "ranks": []}
        link = JobLink(
            "127.0.0.1", port, first._token, clock=RunningClock(), obey=lambda _: None, report=lambda: report
        )
        told = 0
        while told < link_times._MESSAGES + 10:
            link.send(report)
            first._send_to_others({"type": "alive", "sent": time.monotonic()})
            told += bool(first._others)
            await asyncio.sleep(0.05)
        await asyncio.sleep(3 * delay)
        with contextlib.suppress(asyncio.CancelledError):
            await link.close()

    asyncio.run(both())
    said = [line for line in capsys.readouterr().err.splitlines() if "is slow" in line]
    assert len(said) == (delay > 0), said
    if said:
        assert f"the link between {socket.gethostname()} and beta is slow" in said[0]
        assert said[0].split("] ", 1)[1] in (tmp_path / "train.log").read_text()
