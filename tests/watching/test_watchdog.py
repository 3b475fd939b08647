"""The watchdog's process by itself."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

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
