"""The quickstart chooses as many ranks as its batch divides by, whatever the machine has."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from overtok_megatron.errors import ConfigError

LAUNCHERS = Path(__file__).parent.parent / "launchers"


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(LAUNCHERS.parent)
    specification = importlib.util.spec_from_file_location("quickstart", LAUNCHERS / "quickstart.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("gpus", "overrides", "ranks"),
    [
        (0, [], 2),
        (1, [], 1),
        (2, [], 2),
        (3, [], 2),
        (8, [], 2),
        (8, ["training.micro_batch_size=4"], 8),
        (7, ["training.micro_batch_size=4"], 4),
        (3, ["parallel.tensor_parallel_size=2"], 2),
        (8, ["parallel.tensor_parallel_size=2"], 4),
    ],
)
def test_ranks_fit_the_batch(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, gpus: int, overrides: list[str], ranks: int
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")  # the suite itself runs on the CPU
    monkeypatch.setattr(quickstart, "num_accelerators", lambda: gpus)
    assert quickstart.fitting_ranks(overrides) == ranks


def test_on_the_cpu_of_a_gpu_machine_the_gpus_do_not_count(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(quickstart, "num_accelerators", lambda: 8)
    assert quickstart.fitting_ranks(["training.micro_batch_size=4"]) == 2


def test_what_fits_no_number_of_ranks_is_refused(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "num_accelerators", lambda: 3)
    with pytest.raises(ConfigError, match=r"training\.global_batch_size"):
        quickstart.fitting_ranks(["training.global_batch_size=33"])
