"""Over-decoding in training: weights of 0, bfloat16, checkpoints, samples at the end of the data, and what a run reports."""

import math
from itertools import product
from typing import Any

import pytest

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.step_result import StepResult
from support.distributed_harness import run_ranks
from support.later_losses import OD2, OD3
from support.layout_matrix import train_rank as train_matrix_rank
from support.layouts import CPU, EOD, TIED, Layout, layout, layout_config, own_tokens, reference_run, stream

HALF = {"precision": "bf16"}
NO_WEIGHT = {"over_decoding": OD3["over_decoding"] | {"loss_weights": [0.0, 0.0]}}


def train_rank(cases: list[Layout]) -> list[list[StepResult]]:
    """One rank's work: the steps of each case; a run without heads takes the same samples."""
    results = []
    for case in cases:
        config = layout_config(case)
        engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
        results.append([engine.step(own_tokens(engine, batch), 3e-3) for batch in stream(2)])
    return results


ALONE = {
    "no ZeRO": ("", {}),
    "ZeRO 1, tied": ("z1", {"model": TIED}),
    "recomputation": ("z2", {"training": {"recompute": "full"}}),
    "no clipping": ("", {"optimizer": {"gradient_clipping": 0.0}}),
}
TOGETHER = {"TP2+SP": "tp2 sp", "PP2, ZeRO 1": "pp2 z1", "CP2": "cp2", "DP2, ZeRO 3": "z3"}


def pairs_of(shorts: list[tuple[str, dict[str, Any]]]) -> list[Layout]:
    """Each layout without heads, and with heads whose losses have a weight of 0."""
    return [
        layout(short, micro=6, sections=sections, **others)
        for (short, others), sections in product(shorts, ({}, NO_WEIGHT))
    ]


def check_pairs_of(names: list[str], results: list[list[StepResult]], relative: float) -> None:
    for name, without, with_heads in zip(names, results[::2], results[1::2], strict=True):
        assert [step.loss for step in with_heads] == pytest.approx(
            [step.loss for step in without], rel=relative, abs=0.0
        ), name
        assert all(step.auxiliary_losses == {} for step in without)
        for step in with_heads:
            assert step.auxiliary_losses.keys() == {"over_decoding_2", "over_decoding_3"}
            assert all(math.isfinite(loss) and 1.0 < loss < 9.0 for loss in step.auxiliary_losses.values())


def test_heads_of_weight_0_leave_the_main_losses_bit_for_bit() -> None:
    """In one process, where no sum runs over ranks."""
    (results,) = run_ranks(1, train_rank, pairs_of(list(ALONE.values())), timeout=200)
    check_pairs_of(list(ALONE), results, relative=0.0)


def test_heads_of_weight_0_leave_the_main_losses_on_layouts() -> None:
    shorts: list[tuple[str, dict[str, Any]]] = [(short, {}) for short in TOGETHER.values()]
    for results in run_ranks(2, train_rank, pairs_of(shorts), timeout=200):
        check_pairs_of(list(TOGETHER), results, relative=1e-6)


BF16 = {
    "TP2+SP, ZeRO 1": layout("tp2 sp z1", micro=6, training=HALF, sections=OD3),
    "PP2, ZeRO 1, tied": layout("pp2 z1", model=TIED, training=HALF, sections=OD3),
    "CP2, ZeRO 2": layout("cp2 z2", micro=6, training=HALF, sections=OD2),
    "DP2, ZeRO 3, recomputation": layout("z3", training=HALF | {"recompute": "full"}, sections=OD3),
}


def test_bfloat16_follows_one_process_in_float32() -> None:
    """Main losses to 0.4%, those of the tables to 0.4%, joint norms to 5%, as without heads: test_layout_matrix.py."""
    ranks = run_ranks(2, train_matrix_rank, list(BF16.values()), timeout=200)
    for index, (name, case) in enumerate(BF16.items()):
        losses, reference = reference_run(case)
        for rank in ranks:
            assert rank[index].losses == pytest.approx(losses, rel=4e-3), name
            for found, wanted in zip(rank[index].later, reference.later, strict=True):
                assert found == pytest.approx(wanted, rel=4e-3), name
            assert rank[index].norms == pytest.approx(reference.norms, rel=5e-2), name
