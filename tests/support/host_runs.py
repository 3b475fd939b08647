"""The same small run on one host and on several: how it is started, what differs, and how the losses are compared."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from overtok_megatron.launching.local import ENTRY
from support.namespaces import INTERFACE, TwoHosts
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

_TESTS = Path(__file__).parents[1]
_HOST_SCRIPT = _TESTS.parent / "launchers" / "host.sh"
# for ranks that run a module of tests/support
FINDS_SUPPORT = {"PYTHONPATH": os.pathsep.join(filter(None, [str(_TESTS), os.environ.get("PYTHONPATH")]))}


def torchrun(host: int, address: str, port: int, ranks: int, module: str, *words: object) -> list[str]:
    """The command of torchrun for one of two hosts, with so many ranks of a module on it, whose arguments are `words`."""
    options = ["--nnodes=2", f"--nproc-per-node={ranks}", f"--master-addr={address}", f"--master-port={port}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, f"--node-rank={host}"]
    return [*launcher, "-m", module, *map(str, words)]


def start_on_both(
    hosts: TwoHosts, command: Callable[[int], list[str]], **variables: str
) -> list[subprocess.Popen[str]]:
    """Start a command per host, given its number."""
    common = os.environ | VARIABLES | variables
    return [
        host.start(*command(number), env=common | {"HOST_NUMBER": str(number)}) for number, host in enumerate(hosts)
    ]


def start_host_scripts(hosts: TwoHosts, run: list[str], ranks: int) -> list[subprocess.Popen[str]]:
    """Start `launchers/host.sh` on both hosts, for so many ranks in all."""
    variables = {"PYTHON": sys.executable, "HOSTS": "2", "RANKS_PER_HOST": str(ranks // 2)}
    return start_on_both(hosts, lambda _: [str(_HOST_SCRIPT), *run], MASTER_ADDR=hosts.alpha.name, **variables)


def start_ranks(hosts: TwoHosts, run: list[str], module: str = ENTRY, **variables: str) -> list[subprocess.Popen[str]]:
    """Start a rank per host without any launcher, whose exit codes are those of the ranks."""
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500"}
    return start_on_both(
        hosts,
        lambda number: ["env", f"RANK={number}", sys.executable, "-m", module, *run],
        MASTER_ADDR=hosts.alpha.name,
        **common,
        **variables,
    )


def finish(started: list[subprocess.Popen[str]], code: int) -> str:
    """What the commands print, which must all leave with this code."""
    outputs = [process.communicate(timeout=150)[0] for process in started]
    assert [process.returncode for process in started] == [code] * len(started), "\n".join(
        output[-3000:] for output in outputs
    )
    return "".join(outputs)


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
