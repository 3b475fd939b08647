"""Over-decoding over layouts: twenty steps with the losses, norms and weights of the formula in one process, float32 to 1e-5.

Some samples end before their last tokens, so that ranks score different numbers of positions.
"""

import pytest

from support.later_losses import OD2, OD3
from support.layout_matrix import run_matrix
from support.layouts import TIED, WITHIN, Layout, experts, layout

EPS = {"eps": 1e-6}  # as in test_layout_matrix.py
CORE = {
    1: {"one process": layout("", micro=6, sections=OD3)},
    2: {
        "TP2+SP": layout("tp2 sp", micro=6, sections=OD3),
        "PP2, ZeRO 1, tied head": layout("pp2 z1", model=TIED, sections=OD3),
        "CP2, within documents": layout("cp2", micro=6, data=WITHIN, optimizer=EPS, sections=OD2),
        "DP2, ZeRO 3, recomputation": layout("z3", training={"recompute": "full"}, sections=OD3),
    },
}
SLOW = {
    2: {
        "TP2": layout("tp2", micro=6, sections=OD3),
        "TP2, no low rank": layout("tp2 z1", micro=6, sections=OD2),
        "TP2+SP, tied, no low rank": layout("tp2 sp z2", micro=6, model=TIED, sections=OD2),
        "CP2": layout("cp2", micro=6, sections=OD3),
        "CP2, ZeRO 3": layout("cp2 z3", micro=6, sections=OD3),
        "PP2": layout("pp2", sections=OD2),
        "PP2, within documents, recomputation": layout(
            "pp2 z1", data=WITHIN, training={"recompute": "full"}, optimizer=EPS, sections=OD3
        ),
        "PP2, heads alone on the last stage": Layout(
            {"pipeline_parallel_size": 2, "pipeline_partition": [4, 0]}, sections=OD3
        ),
        "DP2, ZeRO 1": layout("z1", sections=OD3),
        "DP2, ZeRO 2": layout("z2", sections=OD3),
        "DP2, ZeRO 2, offload": layout("z2 offload", sections=OD3),
        "recomputation, z-loss": layout("", training={"recompute": "full", "z_loss": 1e-2}, sections=OD3),
        "Olmoe, PP2": experts("pp2 z1", sections=OD3),
        "Olmoe, TP2+SP": experts("tp2 sp", sections=OD3),
    },
    3: {"DP3": layout("", sections=OD3), "DP3, ZeRO 1": layout("z1", sections=OD3)},
    4: {
        "PP4": layout("pp4", sections=OD3),
        "TP2xPP2": layout("tp2 pp2 z1", sections=OD3),
        "TP2xPP2+SP, within documents": layout("tp2 pp2 sp z1", data=WITHIN, optimizer=EPS, sections=OD3),
        "PP2xCP2": layout("pp2 cp2 z1", sections=OD3),
        "PP2xDP2": layout("pp2 z1", sections=OD3),
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
