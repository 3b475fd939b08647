"""The passes between matrix products on a GPU, by every choice of kernels that the machine has, against float64."""

from pathlib import Path

import pytest
import torch
from gpu_checks.passes import fused_passes
from gpu_checks.registry import Context

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_every_choice_computes_the_passes(tmp_path: Path) -> None:
    result = fused_passes(Context(torch.device("cuda", 0), tmp_path))
    assert result.passed, result.figure
    assert "compile" in result.numbers["device_seconds"]
