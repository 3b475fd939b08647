"""The other backbones over layouts: losses, norms and weights of Hugging Face's Llama, Olmo3 and Olmoe in one process.

As in test_layout_matrix.py, which has the layouts themselves.
"""

from pathlib import Path

import pytest

from support.layout_changes import check_pairs, check_universal
from support.layout_matrix import run_matrix
from support.layouts import LLAMA, MANY, OLMO3, OLMOE, TIED, experts, layout

CORE = {
    2: {
        "Llama, TP2+SP, tied": layout("tp2 sp", micro=6, model=LLAMA | TIED),
        "Olmo3, CP2": layout("cp2 z1", micro=6, model=OLMO3),
        "Olmoe, TP2+SP": experts("tp2 sp"),
        "Olmoe, PP2, ZeRO 1": experts("pp2 z1"),
        "Olmoe, CP2": experts("cp2", micro=4),
        "many experts, ZeRO 3, recomputation": experts("z3", model=MANY, training={"recompute": "full"}),
    },
}
SLOW = {
    2: {
        "Llama, PP2": layout("pp2 z1", model=LLAMA),
        "Llama, CP2, ZeRO 3": layout("cp2 z3", model=LLAMA),
        "Olmo3, TP2, recomputation": layout("tp2", model=OLMO3, training={"recompute": "selective"}),
        "Olmo3, PP2": layout("pp2", model=OLMO3),
        "Olmoe, TP2": experts("tp2 z2"),
        "Olmoe, weights to 1, DP2": experts("z1", model=OLMOE | {"normalize_expert_weights": True}),
        "many experts, DP2": experts("", model=MANY),
        "many experts, ZeRO 1": experts("z1", model=MANY),
        "many experts, ZeRO 2": experts("z2", model=MANY),
        "many experts, ZeRO 2, offload": experts("z2 offload", model=MANY),
        "many experts, PP2, recomputation": experts("pp2 z1", model=MANY, training={"recompute": "full"}),
    },
    4: {
        "Olmoe, TP2xPP2+SP, tied": experts("tp2 pp2 sp z1", model=OLMOE | TIED),
        "Olmoe, TP2xPP2": experts("tp2 pp2 z1"),
        "Olmoe, TP2xCP2+SP": experts("tp2 cp2 sp z1"),
        "Olmoe, PP2xCP2": experts("pp2 cp2 z1"),
        "Olmo3, TP2xCP2": layout("tp2 cp2 z1", model=OLMO3),
    },
}


@pytest.mark.ci
@pytest.mark.parametrize("world", CORE)
def test_core_layouts_equal_one_process(world: int) -> None:
    run_matrix(world, CORE[world], timeout=200)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", SLOW)
def test_more_layouts_equal_one_process(world: int) -> None:
    run_matrix(world, SLOW[world], timeout=800)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_go_on_in_another_layout(tmp_path: Path) -> None:
    """Their three dimensions split along two of them, read by another layout and by DeepSpeed's converter."""
    layouts = {"TP2": (2, experts("tp2 z1")), "DP2, ZeRO 3": (2, experts("z3"))}
    check_pairs(layouts, [("TP2", "DP2, ZeRO 3")], tmp_path)
    check_universal(tmp_path / "TP2", tmp_path / "universal")
