"""DeepSpeed's own collectives run in spans: a rank that waits in one of them is said to be in it, and for how long."""

import threading
import time
from typing import Any

import torch.distributed as dist

from overtok_megatron.parallel.spans import seconds_waited, under_way
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, layout, layout_config, own_tokens, stream

# Every function of torch.distributed by which ranks communicate.
COMMUNICATING = (
    "all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "broadcast_object_list", "all_gather", "all_gather_object",
    "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "send", "recv",
    "isend", "irecv", "gather", "scatter", "barrier", "batch_isend_irecv",
)  # fmt: skip


CASES = [("z0", False), ("z0", True), ("z1", True), ("z2", False), ("z3", True), ("pp2", False), ("pp2 z1", True)]
Found = tuple[set[str], set[str]]


def collectives_of_steps(cases: list[tuple[str, bool]]) -> list[Found]:
    """One rank's work: in each layout, of two steps and an evaluation, the collectives outside of spans, and all names."""
    outside: set[str] = set()
    spans: set[str] = set()

    def watched(name: str, function: Any) -> Any:
        def call(*arguments: Any, **others: Any) -> Any:
            open_now = [what for what, _ in under_way()]
            spans.update(open_now)
            if not open_now:
                outside.add(name)
            return function(*arguments, **others)

        return call

    for name in COMMUNICATING:
        setattr(dist, name, watched(name, getattr(dist, name)))
    found: list[Found] = []
    for short, half in cases:
        config = layout_config(layout(short, training={"precision": "bf16" if half else "fp32"}))
        engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
        outside.clear()  # torch makes process groups with a barrier of its own
        spans.clear()
        for step in range(2):
            engine.step(own_tokens(engine, stream()[step]), 3e-3)
        inputs, targets = engine.inputs_and_targets(own_tokens(engine, stream()[2]))
        engine.evaluate(zip(inputs, targets, strict=True))
        if engine.tables is not None:
            engine.tables.settle()
        assert not under_way()
        found.append((set(outside), set(spans)))
    return found


def test_every_collective_of_a_step_is_in_a_span() -> None:
    for found in run_ranks(2, collectives_of_steps, CASES):
        for (short, _), (outside, spans) in zip(CASES, found, strict=True):
            assert not outside, short
            assert any("DeepSpeed's" in name for name in spans), (short, spans)
            assert any("DeepSpeed's" not in name for name in spans), (short, spans)


def waits_for_the_other() -> tuple[list[str], float]:
    """One rank's work: rank 1 comes half a second late to an all-reduce of DeepSpeed, and another one that is launched."""
    import deepspeed.comm
    import torch

    config = layout_config(layout(""))
    start_processes(config, CPU)
    start_processes(config, CPU)  # a second start in one process wraps nothing twice
    seen: list[str] = []

    def look() -> None:
        time.sleep(0.3)
        seen.extend(name for name, _ in under_way())

    begin = seconds_waited(time.monotonic())
    for launched in (False, True):
        looking = threading.Thread(target=look)
        looking.start()
        if dist.get_rank() == 1:
            time.sleep(0.6)
        work = deepspeed.comm.all_reduce(torch.ones(3), async_op=launched)
        if launched:
            assert work.wait() in (True, None)
            assert work.is_completed()
        looking.join()
    return seen, seconds_waited(time.monotonic()) - begin


def test_a_rank_that_waits_in_deepspeed_is_said_to() -> None:
    (waiting, long), (late, short) = run_ranks(2, waits_for_the_other)
    assert len(waiting) == 2, waiting
    assert all(name.endswith(": DeepSpeed's all-reduce") for name in waiting)
    assert not late
    assert 0.9 < long < 2.0
    assert short < 0.3
