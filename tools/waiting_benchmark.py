"""`benchmark.py waiting`: how OpenMP threads wait for each other, on an idle machine and beside other work.

The work is that of decoding token by token: norms and small matrix products, each a parallel loop of some microseconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from overtok_megatron.environment import SPIN_COUNT

_WAYS = {  # how threads wait -> what the environment says
    "spin (the library's default)": {},
    f"spin {SPIN_COUNT} times (ours)": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "sleep at once": {"OMP_WAIT_POLICY": "passive"},
}
_LOOPS = """
import json, sys, time
import torch
from overtok_megatron.kernels.choice import choose_kernels

torch.set_num_threads(int(sys.argv[1]))
kernels = choose_kernels("auto", torch.device("cpu"))
x, weight, matrix = torch.randn(64, 256), torch.randn(256), torch.randn(256, 1024)

def seconds(times):
    begin = time.perf_counter()
    for _ in range(times):
        torch.relu(kernels.rms_norm(x, weight, 1e-6) @ matrix)
    return (time.perf_counter() - begin) / times

seconds(200)
print(json.dumps([seconds(100) for _ in range(20)]))
"""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Other work on the machine: processes that use a core each, for two minutes at most."""
    loop = "import time; end = time.time() + 120\nwhile time.time() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def waiting(options: argparse.Namespace) -> dict[str, Any]:
    """Median and largest seconds of a block's norm and product, for each way of waiting beside 0, 1, .. busy processes."""
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    times: dict[str, dict[str, list[float]]] = {}
    for turn in range(options.rounds):
        for busy in range(options.busy + 1):
            for way, more in _WAYS.items():
                command = [sys.executable, "-c", _LOOPS, str(options.threads)]
                with busy_processes(busy):
                    done = subprocess.run(command, env=plain | more, check=True, capture_output=True, text=True)
                times.setdefault(f"beside {busy} busy processes", {}).setdefault(way, []).extend(
                    json.loads(done.stdout.splitlines()[-1])
                )
        print(f"round {turn + 1} of {options.rounds}", flush=True)
    return {
        "seconds": {
            place: {way: {"median": statistics.median(all_), "largest": max(all_)} for way, all_ in ways.items()}
            for place, ways in times.items()
        }
    }
