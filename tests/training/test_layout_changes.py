"""A run saved on one layout goes on, on any other, with the losses of the run that was never interrupted (float32, 1e-5)."""

from itertools import permutations
from pathlib import Path

import pytest

from support.layout_changes import check_pairs, check_universal
from support.layouts import TIED, Layout, layout

ADAM = {"optimizer": "adam", "added": [{"orders": [4, 2], "table_rows": 31}]}  # whose state must come along
LAYOUTS: dict[str, tuple[int, Layout]] = {
    "single": (1, layout("z1", micro=6, over=ADAM)),
    "DP2, ZeRO 1": (2, layout("z1", over=ADAM)),
    "DP4, ZeRO 3": (4, layout("z3", micro=3, over=ADAM)),
    "TP2xPP2": (4, layout("tp2 pp2 z1", micro=3, over=ADAM)),
}
OTHERS: dict[str, tuple[int, Layout]] = {
    "single, no ZeRO": (1, layout("", micro=6, over=ADAM, model=TIED)),
    "TP2, no ZeRO": (2, layout("tp2", micro=6, over=ADAM, model=TIED)),
    "CP2, ZeRO 2": (2, layout("cp2 z2", micro=6, over=ADAM, model=TIED)),
    "PP2, no ZeRO": (2, layout("pp2", over=ADAM, model=TIED)),
    "DP3, ZeRO 1, offload": (3, layout("z1 offload", over=ADAM, model=TIED)),
    "DP2, ZeRO 3": (2, layout("z3", over=ADAM, model=TIED)),
}


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_some_pairs_of_layouts(tmp_path: Path) -> None:
    pairs = [("TP2xPP2", "DP4, ZeRO 3"), ("DP4, ZeRO 3", "DP2, ZeRO 1"), ("DP2, ZeRO 1", "TP2xPP2")]
    check_pairs(LAYOUTS, pairs, tmp_path)
    for name in ("TP2xPP2", "DP4, ZeRO 3"):
        check_universal(tmp_path / name, tmp_path / "universal" / name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_pairs_of_layouts(tmp_path: Path) -> None:
    check_pairs(LAYOUTS, list(permutations(LAYOUTS, 2)), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_pairs_of_other_layouts_with_a_tied_head(tmp_path: Path) -> None:
    check_pairs(OTHERS, list(permutations(OTHERS, 2)), tmp_path)
