"""What a process's environment says before torch is imported, and what reaches the ranks through DeepSpeed's launcher."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from overtok_megatron.environment import (
    ALLOCATOR,
    available_cores,
    rank_environment,
    restore_visible_devices,
    set_library_defaults,
    usable_devices,
)
from overtok_megatron.errors import ConfigError
from overtok_megatron.launching.local import launcher_command
from overtok_megatron.parallel import devices
from overtok_megatron.placement import Placement
from overtok_megatron.training.before_training import choose_device
from overtok_megatron.training.entry import prepare_environment
from support.marker_expressions import asks_for_gpu

PROBE = """
import json, os, sys
from overtok_megatron.environment import restore_visible_devices

counted = os.environ.get("CUDA_VISIBLE_DEVICES")
restore_visible_devices(os.environ)
found = {"counted": counted, "visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "path": sys.path}
open(os.environ["PROBE_OUTPUT"] + os.environ["RANK"], "w").write(json.dumps(found))
"""


@pytest.mark.parametrize("cuda", [False, True])
def test_threads_and_allocator_are_set_beside_a_gpu_too(cuda: bool) -> None:
    """Tables in host memory and offloaded optimizers compute on the CPU: eight ranks must not take all cores each."""
    environment = rank_environment({"PATH": "x"}, 8, deterministic=False, cuda=cuda)
    assert environment["OMP_NUM_THREADS"] == str(max(1, available_cores() // 8))
    assert environment.items() >= ALLOCATOR.items()
    assert environment["DS_ACCELERATOR"] == ("cuda" if cuda else "cpu")
    assert environment["PATH"] == "x"


def test_what_the_caller_has_set_stands() -> None:
    own = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "active", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    environment = rank_environment(own, 2, deterministic=True, cuda=True)
    assert environment.items() >= own.items()
    assert "GOMP_SPINCOUNT" not in environment  # it would overrule the caller's OMP_WAIT_POLICY


def test_cores_are_those_of_this_process() -> None:
    """A batch system binds a task to a part of the machine."""
    one = sorted(os.sched_getaffinity(0))[0]
    bind = f"import os; os.sched_setaffinity(0, {{{one}}})"
    code = f"{bind}; from overtok_megatron.environment import available_cores; print(available_cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize(("given", "reaches"), [("", None), (":", None), (":a::b", "a:b"), ("a", "a")])
def test_an_empty_part_of_pythonpath_is_the_callers_folder(given: str, reaches: str | None) -> None:
    environment = rank_environment({"PYTHONPATH": given}, 1, deterministic=False, cuda=False)
    assert environment.get("PYTHONPATH") == reaches
    assert environment["PYTHONSAFEPATH"] == "1"


def test_deterministic_runs_get_their_workspace_whoever_starts_them() -> None:
    environment: dict[str, str] = {}
    prepare_environment(environment, deterministic=True)
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    prepare_environment(environment := {}, deterministic=False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in environment


def test_openmp_is_told_how_to_wait_before_torch_is_imported() -> None:
    """In the command itself: its environment is read when torch loads OpenMP."""
    code = (
        "import os, sys; from overtok_megatron.cli import main\n"
        "assert 'torch' not in sys.modules\n"
        "try: main(['--version'])\n"
        "except SystemExit: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    plain = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1000 False"
    set_library_defaults(chosen := {"GOMP_SPINCOUNT": "5", "TRITON_DEFAULT_FP_FUSION": "0"})
    assert chosen == {"GOMP_SPINCOUNT": "5", "TRITON_DEFAULT_FP_FUSION": "0"}


@pytest.mark.parametrize("visible", ["4,5", "GPU-0a1b2c3d-0000-1111-2222-333344445555", None])
def test_ranks_see_the_devices_of_the_caller(tmp_path: Path, visible: str | None) -> None:
    """Through DeepSpeed's own launcher, which counts devices from 0 and knows no names."""
    package = tmp_path / "site"
    package.mkdir()
    (package / "device_probe.py").write_text(PROBE, encoding="utf-8")
    caller = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    caller |= {"PYTHONPATH": str(package), "PROBE_OUTPUT": str(tmp_path / "rank")}
    if visible is not None:
        caller["CUDA_VISIBLE_DEVICES"] = visible
    environment = rank_environment(caller, 2, deterministic=False, cuda=False)
    done = subprocess.run(
        launcher_command("device_probe", [], 2), env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "VISIBLE_DEVICES" not in done.stdout + done.stderr  # advice about flags that nobody gave
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}").read_text(encoding="utf-8"))
        assert found["visible"] == (found["counted"] if visible is None else visible)
        assert "" not in found["path"]  # the folder in which the command was given
        assert str(Path.cwd()) not in found["path"]


def test_the_accelerator_that_the_caller_names_is_one_that_a_run_can_use() -> None:
    """DeepSpeed tells of any other by a traceback."""
    assert usable_devices({}, 8) == usable_devices({"DS_ACCELERATOR": "cuda"}, 8) == 8
    assert usable_devices({"DS_ACCELERATOR": "cpu"}, 8) == usable_devices({}, 0) == 0
    for name in ("CPU", "", "xpu"):
        with pytest.raises(ConfigError, match=f"DS_ACCELERATOR: '{name}'; set it to cpu or cuda, or unset it"):
            usable_devices({"DS_ACCELERATOR": name}, 8)
    with pytest.raises(ConfigError, match="DS_ACCELERATOR: cuda, but torch sees no CUDA device here; set it to cpu"):
        usable_devices({"DS_ACCELERATOR": "cuda"}, 0)


@pytest.mark.parametrize(("visible", "expected"), [(1, 0), (4, 3)])
def test_a_rank_tells_deepspeed_the_device_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, visible: int, expected: int
) -> None:
    """Where a batch system shows each rank its own device only, DeepSpeed would open the one of the rank's number."""
    monkeypatch.setattr(devices, "num_accelerators", lambda: visible)
    monkeypatch.setattr(devices, "make_current", lambda device: None)
    environment = {"LOCAL_RANK": "3"}
    assert str(choose_device(environment, 3)) == f"cuda:{expected}"
    assert environment == {"LOCAL_RANK": str(expected), "DS_ACCELERATOR": "cuda"}


def test_nothing_is_restored_that_nobody_set() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    restore_visible_devices(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "0,1"}


def test_the_suite_itself_sees_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("expression", "asked"),
    [("gpu", True), ("gpu and not slow", True), ("not gpu", False), ("slow and not gpu", False), ("slow", False)],
)
def test_only_who_asks_for_gpu_tests_sees_the_gpus(expression: str, asked: bool) -> None:
    assert asks_for_gpu(expression) is asked


def test_the_hosts_first_rank_is_known_before_ranks_share_device_0(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where each task sees one GPU, LOCAL_RANK becomes 0 on all of them, and each would start a watchdog."""
    from overtok_megatron.training import entry

    seen = []

    def prepare_rank(*_: object, **__: object) -> object:
        os.environ["LOCAL_RANK"] = "0"
        training = types.SimpleNamespace(output_directory=str(tmp_path), hang_timeout=None)
        return types.SimpleNamespace(config=types.SimpleNamespace(training=training))

    def start_watch(place: Placement, *_: object) -> None:
        seen.append(place.local_rank)
        raise ConfigError("far enough")

    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "3")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29511")
    monkeypatch.setattr(entry, "prepare_rank", prepare_rank)
    monkeypatch.setattr(entry, "start_watch", start_watch)
    monkeypatch.setattr(entry.time, "sleep", lambda _: None)
    assert entry.main(["unread.yaml"]) == 2
    assert seen == [3]
