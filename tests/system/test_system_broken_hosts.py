"""Two hosts on which something breaks: the job ends on both in the stated time, names what broke, and goes on afterwards."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overtok_megatron.launching.console import overtok_command
from overtok_megatron.launching.local import ENTRY
from support.host_runs import PIPELINE_ACROSS, SETTINGS, VARIABLES, OneHostRuns
from support.namespaces import Host, TwoHosts, reason_to_skip, two_hosts
from support.overtok_process import wait_for
from support.workspace import Workspace, losses, records

pytestmark = [
    pytest.mark.ci,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(reason := reason_to_skip("pdsh")), reason=reason or ""),
]
ALIVE = "--local_rank"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path) as both:
        yield both


def start(hosts: TwoHosts, workspace: Workspace, *words: str) -> "subprocess.Popen[str]":
    """`overtok train --hostfile` on alpha: a run of one rank per host."""
    ranks, overrides = PIPELINE_ACROSS
    hostfile = hosts.hostfile(workspace.scratch / "hostfile", ranks // 2)
    run = [str(workspace.config("run")), *SETTINGS, *overrides, *words]
    return hosts.alpha.start(*overtok_command("train", *run, "--hostfile", hostfile), env=os.environ | VARIABLES)


def ranks(host: Host) -> list[int]:
    return [process.pid for process in host.processes(ENTRY) if any(ALIVE in word for word in process.cmdline())]


def gone_after(hosts: TwoHosts, limit: float) -> float:
    """Seconds until no rank lives on either host."""
    began = time.monotonic()
    while ranks(hosts.alpha) or ranks(hosts.beta):
        assert time.monotonic() - began < limit, "ranks still live"
        time.sleep(0.1)
    seconds = time.monotonic() - began
    print(f"all ranks have gone after {seconds:.1f} s")  # the figures of launchers/README.md: pytest -s
    return seconds


def said(output: str) -> list[str]:
    return [line.split("[watch] ", 1)[1] for line in output.splitlines() if "[watch] " in line]


@pytest.mark.parametrize(("number", "limit"), [(signal.SIGKILL, 30), (signal.SIGSTOP, 45)])
def test_a_rank_that_dies_or_stops_ends_both_hosts(
    hosts: TwoHosts, workspace: Workspace, number: signal.Signals, limit: float
) -> None:
    process = start(hosts, workspace, "training.train_iters=100000", "training.hang_timeout=10")
    wait_for(lambda: len(records(workspace.scratch / "run")) >= 3, process)
    (victim,) = ranks(hosts.beta)
    os.kill(victim, number)
    gone_after(hosts, limit)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    print("\n".join(said(output)))
    assert "rank 1 on beta" in said(output)[0], output
    assert "Traceback" not in output, output[-3000:]


def test_a_cut_link_ends_both_hosts_and_the_job_comes_back_with_it(
    hosts: TwoHosts, workspace: Workspace, one_host: OneHostRuns
) -> None:
    """The link comes back seconds after the ranks of both hosts have gone; the final losses are those of one host."""
    process = start(hosts, workspace, "--max-restarts", "8")
    run = workspace.scratch / "run"
    wait_for(lambda: len(records(run)) >= 11, process)  # behind the first checkpoint
    hosts.cut()
    gone_after(hosts, 45)
    time.sleep(5)
    hosts.heal()
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    print("\n".join(said(output)))
    assert "beta" in said(output)[0], output
    assert "resumed from" in output
    one_host.check(run, PIPELINE_ACROSS)
    assert losses(run)
