"""Whole runs over two hosts, started in every way but SLURM's: the losses are those of one host."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overtok_megatron.launching.console import overtok_command
from overtok_megatron.launching.local import ENTRY
from support.host_runs import (
    PIPELINE_ACROSS,
    SETTINGS,
    TENSOR_INSIDE,
    VARIABLES,
    Layout,
    OneHostRuns,
    finish,
    start_host_scripts,
    start_on_both,
    torchrun,
)
from support.namespaces import TwoHosts, reason_to_skip, signal_to, two_hosts
from support.overtok_process import wait_for
from support.workspace import Workspace, records

LAUNCHERS = Path(__file__).parents[2] / "launchers"

pytestmark = [
    pytest.mark.ci,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(reason := reason_to_skip("pdsh", "mpirun")), reason=reason or ""),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


def by_hostfile(hosts: TwoHosts, run: list[str], ranks: int, scratch: Path, launcher: str = "pdsh") -> None:
    hostfile = hosts.hostfile(scratch / "hostfile", ranks // 2)
    command = overtok_command("train", *run, "--hostfile", hostfile, "--launcher", launcher)
    # OpenMPI refuses to start anything as root unless both are set
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    hosts.alpha.check(*command, env=os.environ | VARIABLES | as_root)


def by_hostfile_and_mpirun(hosts: TwoHosts, run: list[str], ranks: int, scratch: Path) -> None:
    by_hostfile(hosts, run, ranks, scratch, "openmpi")


def by_deepspeed(hosts: TwoHosts, run: list[str], ranks: int, scratch: Path) -> None:
    """DeepSpeed's launcher, which takes variables for other hosts from a file of the home folder or of the current one."""
    (scratch / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in VARIABLES.items()))
    hostfile = hosts.hostfile(scratch / "hostfile", ranks // 2)
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [str(launcher), f"--hostfile={hostfile}", "--module", ENTRY, *run]
    hosts.alpha.check("bash", "-c", 'cd "$1"; shift; exec "$@"', "bash", scratch, *command)


def by_torchrun(hosts: TwoHosts, run: list[str], ranks: int, scratch: Path) -> None:
    finish(
        start_on_both(hosts, lambda number: torchrun(number, hosts.alpha.address, 29500, ranks // 2, ENTRY, *run)),
        0,
    )


def by_host_script(hosts: TwoHosts, run: list[str], ranks: int, scratch: Path) -> None:
    finish(start_host_scripts(hosts, run, ranks), 0)


def by_mpirun(hosts: TwoHosts, run: list[str], ranks: int, scratch: Path) -> None:
    where = ",".join(f"{host.name}:{ranks // 2}" for host in hosts)
    options = ["--allow-run-as-root", "--host", where]
    environment = os.environ | VARIABLES | {"PYTHON": sys.executable}
    hosts.alpha.check(LAUNCHERS / "mpi.sh", *options, "--", *run, env=environment)


@pytest.mark.parametrize(
    ("start", "layout"),
    [
        (by_hostfile, TENSOR_INSIDE),
        (by_hostfile, PIPELINE_ACROSS),
        (by_hostfile_and_mpirun, PIPELINE_ACROSS),
        (by_deepspeed, PIPELINE_ACROSS),
        (by_torchrun, TENSOR_INSIDE),
        (by_torchrun, PIPELINE_ACROSS),
        (by_host_script, PIPELINE_ACROSS),
        (by_mpirun, PIPELINE_ACROSS),
    ],
)
def test_two_hosts_report_the_losses_of_one(
    hosts: TwoHosts,
    workspace: Workspace,
    one_host: OneHostRuns,
    start: Callable[[TwoHosts, list[str], int, Path], None],
    layout: Layout,
) -> None:
    ranks, overrides = layout
    start(hosts, [str(workspace.config("run")), *SETTINGS, *overrides], ranks, workspace.scratch)
    one_host.check(workspace.scratch / "run", layout)


def test_sigterm_to_one_host_saves_on_both(hosts: TwoHosts, workspace: Workspace, one_host: OneHostRuns) -> None:
    """As when Kubernetes drains one host; the same command then goes on."""
    ranks, overrides = PIPELINE_ACROSS
    run, words = workspace.scratch / "run", [str(workspace.config("run")), *SETTINGS, *overrides]
    started = start_host_scripts(hosts, words, ranks)
    wait_for(lambda: bool(records(run)), started[0])
    asked = time.monotonic()
    signal_to(started[1], signal.SIGTERM)
    assert "SIGTERM on rank 1" in finish(started, 143)
    assert time.monotonic() - asked < 30
    assert len(records(run)) < 30
    assert "resumed from" in finish(start_host_scripts(hosts, words, ranks), 0)
    one_host.check(run, PIPELINE_ACROSS)


def test_a_rank_that_is_late_is_named_with_its_host(hosts: TwoHosts, workspace: Workspace) -> None:
    """The host of the first rank says it, and neither of its watchdogs takes the link for slow."""
    run = [str(workspace.config("run")), *SETTINGS, "training.straggler_report_interval=10"]
    meet = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={hosts.alpha.address}", "--master-port=29500"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meet]
    started = start_on_both(
        hosts,
        lambda number: [*torchrun, f"--node-rank={number}", "-m", "support.late_entry", *run],
        PYTHONPATH=str(Path(__file__).parents[1]),
    )
    output = finish(started, 0)
    (line, *_) = [line for line in output.splitlines() if "is late by" in line]
    assert "[rank 0] rank 1 (beta) is late by 0." in line
    assert "above all in phase 'update of rows'" in line
    assert "is slow" not in output
    named = [record for record in records(workspace.scratch / "run") if record.get("stragglers/late_rank") == 1]
    assert [record["step"] for record in named] == [10, 20, 30]
