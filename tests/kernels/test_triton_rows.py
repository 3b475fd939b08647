"""The Triton kernels without a GPU: interpreted they do what torch does, and all of them compile for NVIDIA's Ampere and
Hopper without spilling a register."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from gpu_checks import row_checks
from kernel_resources import CAPABILITIES, Case, cases, resources


def test_interpreted_kernels_do_what_torch_does() -> None:
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(str(row_checks.__file__))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=200)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not know this NumPy (3.6 with NumPy 2.4)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [check.__name__ for check in row_checks.CHECKS]


def check_compiled(case: Case, capability: int, spilled: int = 0) -> None:
    compiled = resources(case, capability)
    assert "atom" not in compiled.ptx  # the order of every sum is fixed
    assert compiled.spilled <= spilled, compiled
    assert 0 < compiled.registers <= 255


@pytest.mark.parametrize("case", cases([64]), ids=lambda case: case.name)
def test_kernels_compile_for_hopper(case: Case) -> None:
    check_compiled(case, 90)


@pytest.mark.ci
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", cases([24, 64, 128, 256, 512, 1024, 2048]), ids=lambda case: case.name)
def test_kernels_compile_for_cards_and_widths(case: Case, capability: int) -> None:
    """Two registers of one case (int8, 128 values, sm_90) lie in memory while a subroutine divides; nothing else may."""
    check_compiled(case, capability, spilled=8 if "i8 w 128" in case.name else 0)
