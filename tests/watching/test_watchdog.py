"""The watchdog's process by itself."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from overtok_megatron.watching.links import encoded
from overtok_megatron.watching.watchdog import HostWatch, Settings, WatchedRank

_RANK = """
import sys
import time
from pathlib import Path
from overtok_megatron.watching.starting import Place, start_watch
place = Place(rank=0, local_rank=0, ranks=2, host_ranks=1, address="127.0.0.1", port=sys.argv[1], host_number="", attempt="0")
watch = start_watch(place, Path(sys.argv[2]), 300.0)
time.sleep(2)
watch.goodbye(0)
"""


def watchdogs(folder: Path) -> list[psutil.Process]:
    return [
        one
        for one in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in one.info["cmdline"] or ())
    ]


@pytest.mark.ci
def test_the_first_watchdog_leaves_though_another_host_never_came(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-P", "-c", _RANK, str(tmp_path.stat().st_ino), str(tmp_path)], check=True, timeout=60
    )
    begin = time.monotonic()
    assert watchdogs(tmp_path), "it waits for the other host"
    while watchdogs(tmp_path):
        assert time.monotonic() - begin < 45, "it waits for ever"
        time.sleep(0.5)


def test_a_rank_that_died_before_it_was_registered_is_told_as_dead(tmp_path: Path) -> None:
    """Its greeting and what else it said wait in the socket, and the kernel knows its process no more."""

    async def watch(*words: dict[str, object]) -> WatchedRank:
        settings = Settings(listener=-1, ranks=1, host_ranks=1, first=True, folder=str(tmp_path), hang_timeout=None)
        host = HostWatch(settings)
        server = await asyncio.start_unix_server(host._serve_rank, path=tmp_path / "socket")
        text = b"".join(encoded(word) for word in ({"type": "hello", "rank": 0}, *words))
        command = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(eval(sys.argv[2]))"
        # This thread serves nothing meanwhile, so that the process is there no more when the watchdog looks for it.
        subprocess.run([sys.executable, "-c", command, str(tmp_path / "socket"), repr(text)], check=True)
        deadline = time.monotonic() + 20
        while not (0 in host._ranks and host._ranks[0].gone):
            assert time.monotonic() < deadline, "it is never known to have gone"
            await asyncio.sleep(0.01)
        if host._ending is not None:
            await host._ending
        server.close()
        return host._ranks[0]

    died = asyncio.run(watch())
    assert (died.state, died.how, died.pidfd) == ("died", "died", None)
    assert "rank 0 on " in (tmp_path / "train.log").read_text()
    left = asyncio.run(watch({"type": "bye", "code": 0, "why": "", "said": False}))
    assert (left.state, left.code) == ("left", 0)
