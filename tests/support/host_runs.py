"""The same small run on one host and on several: what differs between them, and how their losses are compared."""

from pathlib import Path

import pytest

from support.namespaces import INTERFACE
from support.overtok_process import run_overtok
from support.workspace import Workspace, losses

TENSOR_INSIDE = (4, ("parallel.tensor_parallel_size=2",))  # on two hosts, with the data axis across
PIPELINE_ACROSS = (2, ("parallel.pipeline_parallel_size=2",))
Layout = tuple[int, tuple[str, ...]]
SETTINGS = (
    "training.precision=fp32",
    "over_encoding.row_dtype=float32",
    "over_encoding.state_dtype=float32",
    "training.num_threads=1",  # several threads sum in another order, and fewer ranks of a host have more threads
    "training.train_iters=30",  # enough to be stopped on the way
    "training.validation_interval=10",
    "checkpoint.interval=10",
)
# The ranks' variables. Without the interface gloo takes the address of the host's name, which may be that of the loopback.
VARIABLES = {"GLOO_SOCKET_IFNAME": INTERFACE, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


class OneHostRuns:
    """Runs on one host, each made when a test first asks for its losses."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._reported: dict[Layout, list[tuple[float, float, float | None]]] = {}

    def check(self, run: Path, layout: Layout) -> None:
        """A run on several hosts has the losses of one host: in the same layout to the last bit, and those of one process."""
        found = losses(run)
        assert found == self._losses(layout)
        for (_, loss, validation), (_, wanted, held_out) in zip(found, self._losses((1, ())), strict=True):
            assert loss == pytest.approx(wanted, rel=1e-5)
            assert validation == (None if held_out is None else pytest.approx(held_out, rel=1e-5))

    def _losses(self, layout: Layout) -> list[tuple[float, float, float | None]]:
        if layout not in self._reported:
            ranks, overrides = layout
            name = f"one_{len(self._reported)}"
            config = self._workspace.config(name)
            code, output = run_overtok("train", config, "--processes", ranks, *SETTINGS, *overrides)
            assert code == 0, output
            self._reported[layout] = losses(self._workspace.scratch / name)
        return self._reported[layout]


@pytest.fixture(scope="session")
def one_host(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> OneHostRuns:
    return OneHostRuns(Workspace(data_folder, tmp_path_factory.mktemp("one_host")))
