"""A training step waits for the device at few places, all of them known: the host must keep ahead of the device."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.utils.timer import ThroughputTimer
from gpu_checks.waits import ALLOWED, Place, explicit_waits_counted
from torch import Tensor

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.later_losses import OD3
from support.layouts import CPU, EOD, WITHIN, Layout, experts, layout, layout_config, own_tokens, stream
from support.waits import WaitCounter, synchronize_counted

HALF = {"precision": "bf16"}
D2 = {"multi_token_prediction": {"depth": 2}}
CASES: dict[str, Layout] = {
    "ZeRO 1": layout("z1", training=HALF),
    "ZeRO 2": layout("z2", training=HALF),
    "no ZeRO, float32": layout(""),
    "PP2": layout("pp2 z1", training=HALF),
    "experts": experts("z1", training=HALF),
    "multi-token prediction, PP2": layout("pp2 z1", training=HALF, sections=D2),
    "multi-token prediction, ZeRO 2": layout("z2", training=HALF, sections=D2),
    "over-decoding, within documents": layout("z1", training=HALF, data=WITHIN, sections=OD3),
}
MORE: dict[str, Layout] = {
    "ZeRO 3": layout("z3", training=HALF),
    "no ZeRO": layout("", training=HALF),
    "offload": layout("z2 offload"),
    "TP2": layout("tp2 z1", training=HALF),
    "ZeRO 1, no tables": layout("z1", training=HALF, over={"enabled": False}),
}
# Each is named in a comment where it is made.
KNOWN = {
    Place(True, "training/deepspeed/joint_norm.py", "finish_step"): 1,
    Place(True, "training/step_result.py", "reduce"): 1,
}
# The CPU's forms; CUDA has others, which wait for nothing.
CPU_FORMS = {("kernels/rows.py", "add"), ("kernels/grouped.py", "products"), ("kernels/grouped.py", "outer_products")}


@dataclass(frozen=True)
class Found:
    """Where a step waited. synchronized: where DeepSpeed called its accelerator's `synchronize`."""

    places: Counter[Place]
    synchronized: Counter[Place]


def places_of_a_step(cases: list[Layout]) -> list[Found]:
    """One rank's work: where each layout's fourth step waits, its coming step's announcement included.

    Not an earlier one: DeepSpeed's timers begin with the third.
    """
    found = []
    for case in cases:
        config = layout_config(case)
        engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
        batches = [own_tokens(engine, batch) for batch in stream(engine.extra_tokens - 1)[:5]]
        engine.announce(batches[0])
        for step in range(4):
            with WaitCounter() as counter, synchronize_counted() as synchronized:
                engine.announce(batches[step + 1])
                engine.step(batches[step], 1e-3)
        found.append(Found(counter.places, synchronized))
    return found


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_a_step_waits_where_it_is_known_to(cases: dict[str, Layout]) -> None:
    assert sum(KNOWN.values()) <= ALLOWED
    for results in run_ranks(2, places_of_a_step, list(cases.values())):
        for name, found in zip(cases, results, strict=True):
            ours = {place: count for place, count in found.places.items() if place.ours}
            measured = {place: count for place, count in ours.items() if (place.file, place.function) not in CPU_FORMS}
            assert measured == KNOWN, name
            assert not found.synchronized, name
            print(
                f"{name}, DeepSpeed's:", {str(place): count for place, count in found.places.items() if not place.ours}
            )


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * grad.sum().item()


def _hooked(x: Tensor) -> None:
    weight = x.clone().requires_grad_()
    weight.register_post_accumulate_grad_hook(lambda leaf: float(leaf.grad.sum()) and None)
    weight.sum().backward()


VALUES = torch.tensor([2.0, 0.0, 1.0])
MASK = VALUES > 0
WAITING: dict[str, Callable[[], object]] = {
    "item": lambda: VALUES[0].item(),
    "tolist": lambda: VALUES.tolist(),
    "cpu": lambda: VALUES.cpu(),
    "numpy": lambda: VALUES.numpy(),
    "to": lambda: VALUES.to(torch.device("meta")),
    "bool": lambda: bool(VALUES[0]),
    "if": lambda: 1 if VALUES[0] > 1 else 0,
    "float": lambda: float(VALUES[0]),
    "int": lambda: int(VALUES[0]),
    "nonzero": lambda: VALUES.nonzero(),
    "where": lambda: torch.where(MASK),
    "mask": lambda: VALUES[MASK],
    "mask set": lambda: VALUES.clone().__setitem__(MASK, torch.ones(2)),
    "masked_select": lambda: VALUES.masked_select(MASK),
    "unique": lambda: VALUES.unique(),
    "repeat_interleave": lambda: VALUES.repeat_interleave(torch.tensor([1, 2, 0])),
    "tensor": lambda: torch.tensor([1.0], device=CPU),
    "backward": lambda: _ReadsInBackward.apply(VALUES.clone().requires_grad_()).sum().backward(),
    "autograd": lambda: torch.autograd.backward(_ReadsInBackward.apply(VALUES.clone().requires_grad_()).sum()),
    "hook": lambda: _hooked(VALUES),
}
NOT_WAITING: dict[str, Callable[[], object]] = {
    "where": lambda: torch.where(MASK, VALUES, 0.0),
    "fill": lambda: VALUES.clone().__setitem__(MASK, 0.0),
    "slice": lambda: VALUES[1:],
    "index": lambda: VALUES[torch.tensor([0, 2])],
    "repeat_interleave": lambda: VALUES.repeat_interleave(2),
    "sized": lambda: VALUES.repeat_interleave(torch.tensor([1, 2, 0]), output_size=3),
    "host tensor": lambda: torch.tensor([1.0]),
    "dtype": lambda: VALUES.to(torch.float64),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_counter_sees(name: str) -> None:
    with WaitCounter() as counter:
        WAITING[name]()
    assert sum(counter.places.values()) == 1


@pytest.mark.parametrize("name", NOT_WAITING)
def test_the_counter_leaves_out(name: str) -> None:
    with WaitCounter() as counter:
        NOT_WAITING[name]()
    assert not counter.places


def test_a_call_of_synchronize_belongs_to_who_asked_for_it() -> None:
    """DeepSpeed's accelerator hands the call on to torch; one wait counts once, whatever it calls itself."""
    accelerator = get_accelerator()
    with synchronize_counted() as places:
        timer = ThroughputTimer(DeepSpeedThroughputTimerConfig(), batch_size=1, start_step=0)
        timer.start()
        timer.stop()
    assert places == {Place(False, "utils/timer.py", "start"): 1, Place(False, "utils/timer.py", "stop"): 1}
    assert "synchronize" not in vars(accelerator)  # as it was

    class Event:
        def synchronize(self) -> None:
            accelerator.synchronize()

    places = Counter()
    with explicit_waits_counted(places, [Event, accelerator]) as explicit:
        Event().synchronize()
        assert not explicit.is_waiting()
    assert places.total() == 1
