"""ZeRO 1 in bf16 adds each gradient to its float32 sum as soon as backward has made it: bit for bit what it adds afterwards."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, MANY, TIED, Layout, experts, layout, layout_config, own_tokens, stream

HALF = {"precision": "bf16"}
CASES: dict[str, Layout] = {
    "PP2, tied": layout("pp2 z1", model=TIED, training=HALF),
    "DP2, experts of which some have no token": experts("z1", model=MANY, training=HALF),
}
MORE: dict[str, Layout] = {
    "DP2": layout("z1", training=HALF),
    "TP2, tied": layout("tp2 z1", model=TIED, training=HALF),
    "TP2, sequence parallel": layout("tp2 z1 sp", training=HALF),
    "CP2": layout("cp2 z1", training=HALF),
    "recomputation": layout("z1", training=HALF | {"recompute": "full"}),
    "PP2, experts": experts("pp2 z1", training=HALF),
    "offload": layout("z1 offload", training=HALF),  # by another class, which the key does not concern
}


@dataclass(frozen=True)
class Found:
    """losses and norms of two steps, the weights after them, and whether DeepSpeed's optimizer added gradients at once."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    at_once: bool


def train(cases: list[Layout]) -> list[tuple[Found, Found]]:
    """One rank's work: each layout as it is derived, and with DeepSpeed's key turned off."""
    results = []
    for case in cases:
        pair = []
        for changes in ({}, {"bf16": {"immediate_grad_update": False}}):
            config = layout_config(case).model_copy(update={"deepspeed": changes})
            engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
            steps = [engine.step(own_tokens(engine, batch), 3e-3) for batch in stream()[:2]]
            weights = {name: weight.clone() for name, weight in engine.dense_weights().items()}
            at_once = getattr(engine.deepspeed_engine.optimizer, "immediate_grad_update", False)
            pair.append(Found([step.loss for step in steps], [step.grad_norm for step in steps], weights, at_once))
        results.append((pair[0], pair[1]))
    return results


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_the_same_bits(cases: dict[str, Layout]) -> None:
    for results in run_ranks(2, train, list(cases.values())):
        for name, (at_once, afterwards) in zip(cases, results, strict=True):
            assert (at_once.at_once, afterwards.at_once) == ("offload" not in name, False), name
            assert at_once.losses == afterwards.losses, name
            assert at_once.norms == afterwards.norms, name
            for parameter, weight in at_once.weights.items():
                assert torch.equal(weight, afterwards.weights[parameter]), (name, parameter)
