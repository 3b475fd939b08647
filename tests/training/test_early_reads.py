"""What a step reports is complete before the update of the dense parameters, and read behind it, whatever updates them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from overtok_megatron.training import engine as engine_module
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, Layout, layout, layout_config, own_tokens, stream

HALF = {"precision": "bf16"}
CASES: dict[str, Layout] = {
    "ZeRO 1, bf16": layout("z1", training=HALF),
    "ZeRO 2": layout("z2"),
    "ZeRO 3": layout("z3"),
    "no ZeRO, float32": layout(""),
    "no ZeRO, bf16": layout("", training=HALF),
    "PP2, bf16": layout("pp2 z1", training=HALF),
}
MORE: dict[str, Layout] = {
    "offload": layout("z2 offload"),
    "ZeRO 3, offload": layout("z3 offload"),
    "PP2, float32": layout("pp2 z1"),
    "TP2": layout("tp2 z1", training=HALF),
}


class Noted:
    """In the place of EarlyReads: notes the calls, and the norm that DeepSpeed's optimizer held at the first mark."""

    def __init__(self, device: torch.device) -> None:
        self.calls: list[str] = []
        self.norm: Any = None
        self.held_norm: Any = None  # gives it; set when the engine is complete

    def begin_step(self) -> None:
        self.calls.append("begin")

    def mark(self) -> None:
        if (
            self.calls[-1] != "update"
        ):  # the first one of the step: a parameter group's update comes before the next one
            self.norm = self.held_norm()
            self.calls.append("mark")

    @contextmanager
    def stream(self) -> Iterator[None]:
        self.calls.append("read")
        yield


def orders(cases: list[Layout]) -> list[tuple[list[str], bool]]:
    """One rank's work: the calls of each layout's second step, and whether the norm that is read was there at the mark."""
    found = []
    with mock.patch.object(engine_module, "EarlyReads", Noted):
        for case in cases:
            config = layout_config(case)
            engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
            noted, optimizer = engine.early_reads, engine.deepspeed_engine.optimizer
            assert isinstance(noted, Noted) and engine.tables is not None

            def held(engine: TrainingEngine = engine, optimizer: Any = optimizer) -> Any:
                own = isinstance(optimizer, torch.optim.Optimizer)
                return engine.adapter.global_norm() if own else optimizer._global_grad_norm

            def reduced(*arguments: Any, noted: Noted = noted, reduce: Any = engine.tables.reduce_gradients) -> Any:
                noted.calls.append("rows")
                return reduce(*arguments)

            def updated(*_: Any, noted: Noted = noted) -> None:
                if noted.calls[-1] != "update":
                    noted.calls.append("update")

            noted.held_norm = held
            engine.optimizer.register_step_post_hook(updated)
            with mock.patch.object(engine.tables, "reduce_gradients", reduced):
                for batch in stream()[:2]:
                    noted.calls.clear()
                    result = engine.step(own_tokens(engine, batch), 3e-3)
            read = engine.adapter.global_norm()
            same = noted.norm is read if isinstance(read, Tensor) else noted.norm == read
            found.append((noted.calls, same and float(read) == result.grad_norm))
    return found


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_a_step_is_read_behind_its_update_from_what_came_before(cases: dict[str, Layout]) -> None:
    for results in run_ranks(2, orders, list(cases.values())):
        for name, (calls, same) in zip(cases, results, strict=True):
            assert calls == ["begin", "rows", "mark", "update", "read", "read"], name
            assert same, name
