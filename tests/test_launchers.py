"""What the launchers install: the same pins with and without a GPU, torch apart."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUB = '#!/bin/sh\necho "$0 $*" >>"$PIP_LOG"\n'


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize("torch_asked", [None, "torch==2.11.0"])
@pytest.mark.parametrize("gpu", [False, True])
def test_packages_are_pinned(tmp_path: Path, gpu: bool, torch_asked: str | None) -> None:
    """Methods of DeepSpeed's optimizers are wrapped: another release must not come in by itself, least of all on a GPU."""
    shutil.copytree(ROOT / "launchers", tmp_path / "launchers")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("python", "pip"):  # an environment that is there already, whose pip only notes what it is asked for
        program(tmp_path / ".venv" / "bin" / name, STUB)
    program(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PIP_LOG": str(tmp_path / "log")}
    environment |= {} if torch_asked is None else {"TORCH": torch_asked}
    script = "source launchers/environment.sh; install_extra quickstart; install_extra quickstart"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True)
    first, second = (tmp_path / "log").read_text(encoding="utf-8").splitlines()  # the second call installs nothing
    constraints = tmp_path / second.split("--constraint ")[1].split()[0]
    pins = constraints.read_text(encoding="utf-8")
    assert "\ndeepspeed==" in pins
    if gpu:
        assert first.endswith(torch_asked or "torch>=2.11")
        assert "\ntorch==" not in pins  # it would bring one that may not fit the driver
    else:
        assert first.endswith(next(line for line in pins.splitlines() if line.startswith("torch==")))
