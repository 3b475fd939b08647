"""launchers/environment.sh with commands that only note their arguments: what it installs, and when again."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with an environment whose pip notes what it is asked for, on a machine with a driver; torch sees no GPU."""
    (tmp_path / "launchers").mkdir()
    for name in ("environment.sh", "constraints.txt"):
        (tmp_path / "launchers" / name).write_bytes((ROOT / "launchers" / name).read_bytes())
    (tmp_path / "pyproject.toml").touch()
    for path, script in (
        (".venv/bin/pip", f'echo "$@" >>{tmp_path}/asked'),
        (".venv/bin/python", 'case "$*" in *is_available*) exit 1 ;; *) echo 2.13.0 ;; esac'),
        ("bin/nvidia-smi", "exit 0"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / path).chmod(0o755)
    return tmp_path


def install(tree: Path, torch: str | None) -> tuple[list[str], str]:
    """What pip was asked for, and the warnings."""
    (tree / "asked").write_text("", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TORCH"}
    environment |= {"PATH": f"{tree / 'bin'}:{os.environ['PATH']}"} | ({} if torch is None else {"TORCH": torch})
    command = f"source {tree}/launchers/environment.sh; install_extra test"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
    return (tree / "asked").read_text(encoding="utf-8").splitlines(), done.stderr


def test_another_torch_is_installed_where_one_is_there(tree: Path) -> None:
    """The first try shows that the driver is too old for the newest: the second must not end at the mark of the first."""
    first, warning = install(tree, None)
    assert len(first) == 2
    assert first[0].endswith("torch>=2.11")
    assert "torch 2.13.0 sees no GPU" in warning
    assert install(tree, None) == ([], "")
    second, _ = install(tree, "torch==2.11.0")
    assert second[0].endswith("torch==2.11.0")
    assert install(tree, "torch==2.11.0") == ([], "")
    assert install(tree, None) == ([], "")


@pytest.mark.parametrize("gpu", [False, True])
def test_packages_are_pinned(tree: Path, gpu: bool) -> None:
    """Methods of DeepSpeed's optimizers are wrapped: another release must not come in by itself, least of all on a GPU."""
    (tree / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\nexit {0 if gpu else 9}\n", encoding="utf-8")
    (first, second), _ = install(tree, None)
    pins = (tree / second.split("--constraint ")[1].split()[0]).read_text(encoding="utf-8")
    assert "\ndeepspeed==" in pins
    if gpu:
        assert first.endswith("torch>=2.11")
        assert "\ntorch==" not in pins  # it would bring one that may not fit the driver
    else:
        assert first.endswith(next(line for line in pins.splitlines() if line.startswith("torch==")))
