"""Devices carry their index, are made in one place, and decide the backend; control messages outlive the step's time limit."""

import ast
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from overtok_megatron.errors import ConfigError
from overtok_megatron.parallel.devices import (
    CPU,
    backend_of,
    default_device,
    indexed,
    local_device,
    named_device,
    num_accelerators,
)
from overtok_megatron.parallel.grid import GridShape, ProcessGrid
from overtok_megatron.training.saving import in_background
from support.distributed_harness import run_ranks

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def eight_cards(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with eight CUDA devices, as far as torch tells; the devices that were made current."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1].index if chosen else 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_device_always_has_its_index(eight_cards: list[torch.device]) -> None:
    assert torch.device("cuda") != torch.device("cuda", 0)  # why: tensors' devices have theirs
    assert (
        default_device() == named_device("cuda", "--device") == indexed(torch.device("cuda")) == torch.device("cuda", 0)
    )
    assert named_device("cuda:5", "--device") == torch.device("cuda", 5)
    assert eight_cards == [torch.device("cuda", 0), torch.device("cuda", 5)]  # kernels are launched on the current one
    assert indexed(torch.device("cuda")) == torch.device("cuda", 5)
    assert named_device("cpu", "--device") == CPU
    with pytest.raises(ConfigError, match="this machine has 8 CUDA devices; write cpu, cuda, or cuda:0 to cuda:7"):
        named_device("cuda:8", "--device")


def test_ranks_of_a_host_take_one_device_each(eight_cards: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [local_device(rank).index for rank in range(8)] == list(range(8)) == [device.index for device in eight_cards]
    with pytest.raises(ConfigError, match="rank 8 of this host: only 8 CUDA devices are visible"):
        local_device(8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a batch system that shows each task its own
    assert local_device(3) == torch.device("cuda", 0)


def test_a_machine_without_gpu() -> None:
    assert num_accelerators() == 0
    assert default_device() == local_device(3) == CPU
    with pytest.raises(ConfigError, match="--device: 'cuda:1'; this machine has no CUDA device; write cpu"):
        named_device("cuda:1", "--device")


def test_the_backend_follows_the_device(eight_cards: list[torch.device]) -> None:
    """Not what the machine has: a run on the CPU of a GPU machine communicates over gloo."""
    assert num_accelerators() == 8
    assert backend_of(CPU) == "gloo"
    assert backend_of(torch.device("cuda", 3)) == "nccl"


def test_devices_are_made_in_one_place() -> None:
    """Elsewhere nobody asks what the machine has, and nobody writes a CUDA device without index."""
    asking = {"is_available", "device_count", "set_device"}
    wrong = []
    for folder in ("overtok_megatron", "tools", "launchers"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == ROOT / "overtok_megatron" / "parallel" / "devices.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in asking and "cuda" in ast.unparse(node.value):
                    wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
                if isinstance(node, ast.Call) and ast.unparse(node).startswith(
                    ("torch.device('cuda'", "torch.device(f'cuda")
                ):
                    wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def test_the_saving_thread_works_on_the_runs_device_in_a_stream_of_its_own(
    eight_cards: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread starts on device 0, in the stream in which the training thread computes."""
    streams = ["default"]

    @contextmanager
    def entered(name: str) -> Iterator[None]:
        streams.append(name)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"new on {device}")
    monkeypatch.setattr(torch.cuda, "stream", entered)
    at_work: list[tuple[int, str]] = []
    in_background(lambda: at_work.append((torch.cuda.current_device(), streams[-1])), torch.device("cuda", 6)).join()
    assert at_work == [(6, "new on cuda:6")]
    assert streams == ["default"]


def control_after_a_pause() -> tuple[list[int], str | None]:
    """One rank's work: the first pauses for longer than a step may take; what the control group and the default group do."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    grid = ProcessGrid.create(GridShape(data=2))
    if grid.rank == 0:
        time.sleep(4)
    gathered = grid.gather_objects(grid.rank * 10)
    grid.wait_for_all()
    if grid.rank == 0:
        time.sleep(4)
    try:
        dist.barrier()
    except RuntimeError as error:
        return gathered, str(error)
    return gathered, None


def test_control_messages_wait_longer_than_a_step_may() -> None:
    """While a rank hashes or writes its files the others must not give up."""
    first, second = run_ranks(2, control_after_a_pause)
    assert first[0] == second[0] == [0, 10]
    assert second[1] is not None  # the limit of a step is in force all the same
    assert ProcessGrid.single().gather_objects("x") == ["x"]
    ProcessGrid.single().wait_for_all()
