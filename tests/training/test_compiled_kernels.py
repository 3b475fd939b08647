"""Training with passes fused by torch.compile, on layouts where something stands between them: float32, against one process."""

import pytest

from support.layout_matrix import run_matrix
from support.layouts import LLAMA, layout

FUSED = {"kernels": "compile"}
CASES = {
    "TP2+SP, ZeRO 1": layout("tp2 sp z1", micro=6, training=FUSED),
    "TP2+SP, pre-norm, recomputed": layout("tp2 sp", micro=6, model=LLAMA, training=FUSED | {"recompute": "full"}),
    "PP2, ZeRO 1": layout("pp2 z1", training=FUSED),
    "DP2, ZeRO 3, recomputed": layout("z3", training=FUSED | {"recompute": "full", "deterministic": True}),
}


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_fused_passes_train_as_one_process_does() -> None:
    run_matrix(2, CASES, timeout=800)
