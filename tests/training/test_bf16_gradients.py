"""ZeRO 1 in bf16: gradients are added up, measured, clipped and cleared in fewer passes than DeepSpeed makes, to one result."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, MANY, TIED, Layout, experts, layout, layout_config, own_tokens, stream

HALF = {"precision": "bf16"}
PADDED = {"hidden_size": 50, "head_size": 8}  # DeepSpeed's flat tensors are longer than the parameters
# Each with whether gradients are added as soon as they are made.
CASES: dict[str, tuple[Layout, bool]] = {
    "PP2, tied": (layout("pp2 z1", model=TIED, training=HALF), True),
    "DP2, padded, at once": (layout("z1", model=PADDED, training=HALF), True),
    "DP2, padded, later": (layout("z1", model=PADDED, training=HALF), False),
}
MORE: dict[str, tuple[Layout, bool]] = {
    "PP2, tied, later": (layout("pp2 z1", model=TIED, training=HALF), False),
    "TP2, tied": (layout("tp2 z1", model=TIED, training=HALF), True),
    "TP2, sequence parallel, later": (layout("tp2 z1 sp", training=HALF), False),
    "experts": (experts("z1", model=MANY, training=HALF), True),
}


@dataclass(frozen=True)
class Found:
    """losses and norms of three steps, the weights after them, and what DeepSpeed appended to its flat tensors, in values.

    squares: per step, this rank's part of the square of the norm, from what DeepSpeed is given and from all gradients.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    padding: int
    squares: list[tuple[float, float]]


def deepspeeds_own(optimizer: Any) -> None:
    """Let DeepSpeed's optimizer add gradients up, clip and clear them by its own methods again."""
    joint_gradients, own_gradients = optimizer.get_grads_for_norm, type(optimizer).get_grads_for_norm

    def gradients(for_clipping: bool = False) -> Any:
        return own_gradients(optimizer, for_clipping=True) if for_clipping else joint_gradients()

    optimizer.get_grads_for_norm = gradients
    del optimizer._update_hp_grad, optimizer.zero_grad


def spied(engine: TrainingEngine, squares: list[tuple[float, float]]) -> Callable[..., Any]:
    """What gives DeepSpeed gradients for its norm, which now keeps the square of their norm, and that of all gradients."""
    optimizer = engine.deepspeed_engine.optimizer
    joint_gradients = optimizer.get_grads_for_norm

    def gradients(for_clipping: bool = False) -> Any:
        if for_clipping:
            return joint_gradients(for_clipping=True)
        dense, _ = type(optimizer).get_grads_for_norm(optimizer)
        assert all(one.any() for one in optimizer.fp32_groups_gradients_flat)
        (norm,), experts_of_deepspeed = joint_gradients()
        assert (norm.shape, norm.dtype, experts_of_deepspeed) == ((1,), torch.float32, {})
        counts_rows = engine.grid.rank == 0 or engine.grid.shape.data > 1
        rows = engine.joint_norm._square.item() if counts_rows else 0.0
        squares.append((norm.item() ** 2, rows + sum(one.double().square().sum().item() for one in dense)))
        return [norm], {}

    return gradients


def train(case: Layout, *, at_once: bool, change: Callable[[Any], None] | None = None) -> Found:
    config = layout_config(case).model_copy(update={"deepspeed": {"bf16": {"immediate_grad_update": at_once}}})
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    optimizer = engine.deepspeed_engine.optimizer
    squares: list[tuple[float, float]] = []
    optimizer.get_grads_for_norm = spied(engine, squares)
    if change is not None:
        change(optimizer)
    steps = [engine.step(own_tokens(engine, batch), 3e-3) for batch in stream()[:3]]
    # Nothing of a step is left for the next one.
    assert not any(one.any() for one in optimizer.fp32_groups_gradients_flat)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    weights = {name: weight.clone() for name, weight in engine.dense_weights().items()}
    losses, norms = [step.loss for step in steps], [step.grad_norm for step in steps]
    return Found(losses, norms, weights, sum(optimizer.group_paddings), squares)


def pairs(cases: list[tuple[Layout, bool]]) -> list[tuple[Found, Found]]:
    """One rank's work: each layout with this project's methods and with DeepSpeed's; with True, gradients are added at once."""
    return [
        (train(case, at_once=at_once), train(case, at_once=at_once, change=deepspeeds_own)) for case, at_once in cases
    ]


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_gradients_are_added_measured_and_clipped_as_deepspeed_does(cases: dict[str, tuple[Layout, bool]]) -> None:
    """Sums and clipped gradients bit for bit; the norm to float32's rounding."""
    ranks = run_ranks(2, pairs, list(cases.values()))
    for results in ranks:
        for name, (own, deepspeeds) in zip(cases, results, strict=True):
            assert (own.losses, own.norms) == (deepspeeds.losses, deepspeeds.norms), name
            assert max(own.norms) > 0.5, "nothing was clipped"
            for parameter, weight in own.weights.items():
                assert torch.equal(weight, deepspeeds.weights[parameter]), (name, parameter)
            assert len(own.squares) == 3
            for one_value, all_gradients in own.squares:
                assert math.isclose(one_value, all_gradients, rel_tol=1e-6), name
    padded = [
        own.padding for results in ranks for name, (own, _) in zip(cases, results, strict=True) if "padded" in name
    ]
    assert any(padded) or not padded
