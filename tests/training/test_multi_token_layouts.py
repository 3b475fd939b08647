"""Multi-token prediction over layouts: twenty steps with the losses, norms and weights of transformers' layers in one process.

Float32 to 1e-5. Some samples end before their last tokens, so that ranks score different numbers of positions.
"""

from typing import Any

import pytest

from support.distributed_harness import run_ranks
from support.later_losses import OD3
from support.layout_matrix import distances_of_weights, run_matrix, train_rank
from support.layouts import LLAMA, OLMO3, TIED, WITHIN, Layout, experts, layout, reference_run

EPS = {"eps": 1e-6}  # as in test_layout_matrix.py
D1 = {"multi_token_prediction": {"depth": 1, "loss_weight": 0.3}}
D2 = {"multi_token_prediction": {"depth": 2, "loss_weight": 0.5}}
GROWN = {"added": [{"orders": [2], "table_rows": 31}], "frozen": True}


def heads(short: str, sections: dict[str, Any] = D2, **others: Any) -> Layout:
    return layout(short, sections=sections, optimizer=EPS, **others)


CORE = {
    1: {"one process, over-decoding": heads("", D2 | OD3, micro=6)},
    2: {
        "TP2": heads("tp2", D1, micro=6),  # splits what the norms and the projection see over the ranks
        "TP2+SP": heads("tp2 sp", micro=6),
        "PP2, ZeRO 1": heads("pp2 z1"),
        "CP2, within documents": heads("cp2", micro=6, data=WITHIN),
        "DP2, ZeRO 2, tied head": heads("z2", model=TIED),
        "DP2, ZeRO 3, recomputation": heads("z3", training={"recompute": "full"}),
    },
}
SLOW = {
    2: {
        "PP2, tied head, within documents": heads("pp2", D1, model=TIED, data=WITHIN),
        "TP2, tied, within documents": heads("tp2 z1", micro=6, model=TIED, data=WITHIN),
        "TP2+SP, Olmo3, recomputation": heads("tp2 sp z2", micro=6, model=OLMO3, training={"recompute": "full"}),
        "CP2": heads("cp2", D1, micro=6),
        "CP2, ZeRO 3, tied": heads("cp2 z3", micro=6, model=TIED, training={"recompute": "selective"}),
        "PP2": heads("pp2"),
        "PP2, over-decoding": heads("pp2 z1", D1 | OD3, model=TIED),
        "PP2, within documents, recomputation": heads("pp2 z1", data=WITHIN, training={"recompute": "full"}),
        "PP2, heads alone on the last stage": Layout(
            {"pipeline_parallel_size": 2, "pipeline_partition": [4, 0], "zero_stage": 0}, sections=D2, optimizer=EPS
        ),
        "PP2, by parameters": Layout(
            {"pipeline_parallel_size": 2, "pipeline_partition": "parameters"}, sections=D1, optimizer=EPS
        ),
        "PP2, added tables, the others frozen": heads("pp2 z1", over=GROWN),
        "TP2, added tables, the others frozen": heads("tp2", micro=6, over=GROWN),
        "PP2, host tables": heads("pp2", over={"storage": "host"}),
        "TP2+SP, host tables": heads("tp2 sp", micro=6, over={"storage": "host"}),
        "PP2, mean": heads("pp2", over={"combine": "mean", "boundary": "ignore"}),
        # An init_std of 0.3 and two depths make 1e-4 of rounding by the twentieth step, in one process as well.
        "DP2, Llama": heads("", model=LLAMA | {"init_std": 0.1}),
        "DP2, ZeRO 1": heads("z1", D1),
        "DP2, ZeRO 2": heads("z2"),
        "DP2, ZeRO 2, offload": heads("z2 offload", model=TIED),
        "DP2, ZeRO 3, tied": heads("z3", model=TIED),
        "DP2, ZeRO 3, offload": heads("z3 offload"),
        "recomputation, z-loss": heads("", training={"recompute": "full", "z_loss": 1e-2}),
        "Olmoe, DP2, ZeRO 2": experts("z2", sections=D2),
        "Olmoe, PP2": experts("pp2 z1", sections=D2),
        "Olmoe, TP2+SP": experts("tp2 sp", sections=D2, micro=6),
        "Olmoe, CP2, recomputation": experts("cp2", sections=D1, micro=6, training={"recompute": "full"}),
    },
    3: {"DP3": heads(""), "DP3, ZeRO 1": heads("z1"), "PP3": heads("pp3 z1", D1)},
    4: {
        "PP4": heads("pp4"),
        "PP4, ZeRO 1, tied": heads("pp4 z1", model=TIED),
        "TP2xPP2": heads("tp2 pp2 z1"),
        "TP2xPP2+SP, within documents": heads("tp2 pp2 sp z1", data=WITHIN),
        "TP2xCP2+SP": heads("tp2 cp2 sp z1", micro=6),
        "TP2xDP2, two-level exchange": heads("tp2 z1", over={"ranks_per_host": 2}),
        "PP2xDP2, two-level exchange": heads("pp2 z1", over={"ranks_per_host": 2}),
        "PP2xCP2, tied": heads("pp2 cp2 z1", model=TIED),
    },
}


@pytest.mark.parametrize("world", CORE)
def test_core_layouts_equal_one_process(world: int) -> None:
    run_matrix(world, CORE[world], timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", SLOW)
def test_more_layouts_equal_one_process(world: int) -> None:
    run_matrix(world, SLOW[world], timeout=800)


HALF = {"precision": "bf16"}
BF16 = {
    "DP2, ZeRO 2, tied head": heads("z2", model=TIED, training=HALF),
    "DP2, ZeRO 3, recomputation": heads("z3", training=HALF | {"recompute": "full"}),
    "DP2, ZeRO 1": heads("z1", training=HALF),
    "PP2, tied head": heads("pp2 z1", model=TIED, training=HALF),
}
MORE_BF16 = {
    "DP2, ZeRO 2": heads("z2", training=HALF),
    "DP2, ZeRO 1, tied head, offload": heads("z1 offload", model=TIED, training=HALF),
    "CP2, ZeRO 2": heads("cp2 z2", micro=6, training=HALF),
    # Not with a tied head: on this stream one step of it has a gradient norm that rounding changes by a multiple, with SP or
    # without, and in one process as well. On three other streams, of 30 steps each, norms in bf16 are within 1.4% everywhere.
    "TP2+SP, ZeRO 2": heads("tp2 sp z2", micro=6, training=HALF),
    "TP2, ZeRO 2, tied head": heads("tp2 z2", micro=6, model=TIED, training=HALF),
    "TP2, ZeRO 1": heads("tp2 z1", micro=6, training=HALF),
    "PP2": heads("pp2 z1", training=HALF),
}


@pytest.mark.parametrize(
    "cases",
    [pytest.param(BF16, marks=pytest.mark.ci), pytest.param(MORE_BF16, marks=pytest.mark.slow)],
    ids=["some", "more"],
)
def test_bfloat16_follows_one_process_in_float32(cases: dict[str, Layout]) -> None:
    """All losses to 0.4% and joint norms to 2% over the twenty steps; each weight ends within 30% of the way that it went.

    That is what rounding to bfloat16 allows: 0.1%, 0.8% and 18% at most were seen. Weights that a step uses several times are
    among them: the head, tied or not, and the embedding's parts. Where a use lost its gradient, the weight would go elsewhere.
    """
    ranks = run_ranks(2, train_rank, list(cases.values()), timeout=200)
    for index, (name, case) in enumerate(cases.items()):
        losses, reference = reference_run(case)
        results = [rank[index] for rank in ranks]
        for rank in results:
            assert rank.losses == pytest.approx(losses, rel=4e-3), name
            assert rank.norms == pytest.approx(reference.norms, rel=2e-2), name
            for found, wanted in zip(rank.later, reference.later, strict=True):
                assert found == pytest.approx(wanted, rel=4e-3), name
        for parameter, share in distances_of_weights(case, results, reference).items():
            assert share < 0.3, (name, parameter)
