"""The watchdogs' processes by themselves, and what ranks tell them."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from overtok_megatron.launching.local import free_port
from overtok_megatron.watching.links import encoded
from overtok_megatron.watching.rank import Watch
from overtok_megatron.watching.watchdog import HostWatch, Settings, WatchedRank

_RANK = """
import sys
import time
from pathlib import Path
from overtok_megatron.launching.batch_systems import find_placement
from overtok_megatron.watching.starting import start_watch
place = find_placement({
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1],
})
watch = start_watch(place, Path(sys.argv[2]), 300.0)
time.sleep(2)
watch.goodbye(0)
"""

# A rank whose thread comes to connect late, as on a busy machine; the store is a file that is there at once for rank 1.
_LATE_RANK = """
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from overtok_megatron.launching.batch_systems import find_placement
from overtok_megatron.watching import rank as rank_module
from overtok_megatron.watching.starting import join_watchdogs, start_watch

connected = rank_module._connected

def late(address):
    time.sleep(0.5 * rank)
    return connected(address)

def get(key):
    while not store.exists() or not store.read_bytes():
        time.sleep(0.01)
    return store.read_bytes()

rank_module._connected = late
rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
store = folder / "store"
place = find_placement({
    "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": port,
})
watch = start_watch(place, folder, 300.0)
join_watchdogs(place, watch, SimpleNamespace(set=lambda key, value: store.write_text(value), get=get))
print("joined", flush=True)
time.sleep(60)
"""


def watchdogs(folder: Path) -> list[psutil.Process]:
    return [
        one
        for one in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in one.info["cmdline"] or ())
    ]


@pytest.mark.ci
def test_the_first_watchdog_leaves_though_another_host_never_came(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-P", "-c", _RANK, str(free_port()), str(tmp_path)], check=True, timeout=60)
    begin = time.monotonic()
    assert watchdogs(tmp_path), "it waits for the other host"
    while watchdogs(tmp_path):
        assert time.monotonic() - begin < 45, "it waits for ever"
        time.sleep(0.5)


def test_a_host_is_watched_from_the_moment_it_has_joined(tmp_path: Path) -> None:
    """Its rank dies at once, before its watchdog's first regular report: the first host learns of it, and ends its own."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", _LATE_RANK, str(rank), port, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "joined\n"
        ranks[1].kill()
        assert ranks[0].wait(20) == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    death = (tmp_path / "train.log").read_text().splitlines()[0]
    assert "rank 1 on " in death
    assert "was ended by SIGKILL" in death


def test_a_watchdog_that_does_not_read_keeps_no_rank_from_leaving(tmp_path: Path) -> None:
    """Beats go on while it is stopped, ten per second: they are dropped, and what comes at the end has room."""
    watch = Watch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(1)
        watch.connect(str(tmp_path / "socket"), 3, complains=False)
        connection, _ = listener.accept()
        deadline = time.monotonic() + 20
        while not watch.watches:
            assert time.monotonic() < deadline
            time.sleep(0.01)

        def live_and_leave() -> None:
            for step in range(3000):
                watch.tell("beat", step=step)
            watch.tell("failed")
            watch.goodbye(1, "RuntimeError: odd")

        leaving = threading.Thread(target=live_and_leave, daemon=True)
        leaving.start()
        leaving.join(20)
        assert not leaving.is_alive(), "the rank waits for its watchdog"
        with connection, connection.makefile() as lines:
            told = [json.loads(next(lines))]
            while told[-1]["type"] != "bye":
                told.append(json.loads(next(lines)))
            assert [one["type"] for one in told if one["type"] != "beat"] == ["hello", "failed", "bye"]


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
