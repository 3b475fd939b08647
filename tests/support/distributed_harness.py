"""Real processes over gloo for tests: results of every rank, errors with their traceback, and a time limit on hangs."""

import io
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from overtok_megatron.launching.local import free_port

# What every rank would import by itself, in seconds: torch's deterministic mode imports its compiler, DeepSpeed an optimizer.
_IMPORTED = [
    "torch",
    "torch._inductor.compile_fx",
    "transformers",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "overtok_megatron.training.trainer",
]


def _rank_main(
    function: Callable[..., Any], rank: int, world: int, port: int, arguments: tuple[Any, ...], results: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    try:
        buffer = io.BytesIO()
        torch.save(function(*arguments), buffer)  # by value: shared tensors would die with this process
        results.put((rank, True, buffer.getvalue()))
    except BaseException:  # reported to the test, whatever it was
        results.put((rank, False, traceback.format_exc()))


def run_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120, fresh: bool = False
) -> list[Any]:
    """Call `function(*arguments)` in `world` processes with a launcher's environment; results in rank order.

    They are forked from one that has imported what is slow to import and done nothing else; fresh: started anew, for what
    is read when a process starts, as the allocator's settings. `function` and all values must pickle. A failing rank, or
    one that has not ended after `timeout` seconds, fails the test.
    """
    context = multiprocessing.get_context("spawn" if fresh else "forkserver")
    if not fresh:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed asks when it is imported
        context.set_forkserver_preload(_IMPORTED)
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(function, rank, world, port, arguments, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    collected: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(collected) < world:
            try:
                rank, good, value = results.get(timeout=0.5)
            except multiprocessing.queues.Empty:  # type: ignore[attr-defined]  # a submodule that typeshed leaves out
                died = [r for r, p in enumerate(processes) if r not in collected and p.exitcode not in (None, 0)]
                assert not died, f"ranks {died} died without a word"
                missing = sorted(set(range(world)) - collected.keys())
                assert time.monotonic() < deadline, f"ranks {missing} did not finish within {timeout} s"
                continue
            assert good, f"rank {rank} failed:\n{value}"
            collected[rank] = torch.load(io.BytesIO(value), weights_only=False)
        for process in processes:
            process.join(timeout=20)
    finally:
        for process in processes:
            process.kill()
    return [collected[rank] for rank in range(world)]
