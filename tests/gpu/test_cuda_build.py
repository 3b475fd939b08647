"""A CUDA build of torch, as GPU users install it, on a machine without a GPU: every tensor is where it should be."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from support.fake_cuda import CASES

pytestmark = [pytest.mark.ci, pytest.mark.timeout(1800)]
TESTS = Path(__file__).parents[1]


def test_every_operator_of_a_forward_pass_is_on_one_device(tmp_path: Path) -> None:
    """torch as launchers/environment.sh asks for it on a GPU machine; the other packages are those of this environment."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    subprocess.run([*pip, "torch>=2.11"], check=True, timeout=1200)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    others = [*(path for path in sys.path if path.endswith("site-packages")), str(TESTS.parent)]
    (packages / "others.pth").write_text("\n".join(others), encoding="utf-8")  # searched after its own
    done = subprocess.run(
        [python, TESTS / "support" / "fake_cuda.py"],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [*CASES, "FlexAttention"]
