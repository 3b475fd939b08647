"""The start of the watch in a rank: the watchdog of its host, the thread that reports to it, and how watchdogs meet."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from overtok_megatron.errors import ConfigError
from overtok_megatron.placement import Placement
from overtok_megatron.watching.rank import Watch
from overtok_megatron.watching.watchdog import Settings

_OLD_WATCHDOG = 60.0  # seconds in which the watchdog of an earlier start of the same job has gone
_WATCHDOG_STARTS = 60.0
_WATCHDOGS_MEET = 60.0  # a watchdog that does not reach the first host's within LOST_AFTER has ended its ranks before
_KEY = "overtok watchdog"


def socket_name(place: Placement) -> str:
    """The name of the socket of this host's watchdog, in Linux's namespace of sockets without files."""
    words = [str(os.getuid()), place.master_address, str(place.master_port), place.host_number, place.attempt]
    if place.world_size == 1:  # perhaps started without a launcher, and so without a port of its own
        words.append(str(os.getpid()))
    return "\0overtok watch " + " ".join(words)


def start_watch(place: Placement, folder: Path, hang_timeout: float | None) -> Watch:
    """The watch of this rank, connected to the watchdog of its host, which the first rank of the host starts here.

    folder: the run's, for reports. hang_timeout: seconds that a step may take; None or 0 = any time. Elsewhere than on Linux
    there is no watchdog. Raises ConfigError where another job on this host has the same address and port.
    """
    watch = Watch()
    if sys.platform != "linux":
        return watch
    if place.local_rank == 0:
        _start_watchdog(place, folder, hang_timeout or None)
    watch.connect(socket_name(place), place.rank, complains=place.local_rank == 0)
    return watch


def _start_watchdog(place: Placement, folder: Path, hang_timeout: float | None) -> None:
    with _listener(place) as listener:
        settings = Settings(
            listener=listener.fileno(),
            ranks=place.world_size,
            host_ranks=place.ranks_of_host,
            first=place.rank == 0,
            folder=str(folder),
            hang_timeout=hang_timeout,
        )
        module = "overtok_megatron.watching.watchdog"
        subprocess.run(  # it leaves at once, and its child watches
            [sys.executable, "-P", "-m", module, json.dumps(vars(settings))],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
        )


def _listener(place: Placement) -> socket.socket:
    """The socket on which the host's watchdog listens; made here, so that no rank finds it missing once this one goes on."""
    deadline = time.monotonic() + _OLD_WATCHDOG
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            listener.bind(socket_name(place))
        except OSError:
            if time.monotonic() > deadline:
                listener.close()
                raise ConfigError(
                    f"MASTER_PORT: {place.master_port}: another job on this host has that port, and its watchdog lives; "
                    "end it, or choose another port"
                ) from None
            time.sleep(0.2)
        else:
            listener.listen(place.ranks_of_host)
            return listener


def join_watchdogs(place: Placement, watch: Watch, store: Any) -> None:
    """Let the watchdogs of all hosts find each other; the first rank of each host must call this, others may.

    store: of torch.distributed, in which the ranks have met. The watchdog of the first rank's host tells its address there.
    """
    if place.local_rank > 0 or place.ranks_of_host == place.world_size or sys.platform != "linux":
        return
    if place.rank == 0:
        port, token = watch.job_address(_WATCHDOG_STARTS)
        store.set(_KEY, f"{port} {token}")
        watch.tell("all come")
    else:
        port_text, token = store.get(_KEY).decode().split()
        watch.meet(place.master_address, int(port_text), token, _WATCHDOGS_MEET)
