"""Two hosts on which the numbers or the disk go wrong: all ranks stop together, and the last checkpoint is a good one."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.host_runs import (
    FINDS_SUPPORT,
    PIPELINE_ACROSS,
    SETTINGS,
    Layout,
    OneHostRuns,
    finish,
    start_host_scripts,
    start_ranks,
)
from support.namespaces import TwoHosts, reason_to_skip, two_hosts
from support.overtok_process import wait_for
from support.planted_entry import MARK, STEP
from support.workspace import Workspace, records

pytestmark = [
    pytest.mark.ci,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(reason := reason_to_skip()), reason=reason or ""),
]
DATA_ACROSS: Layout = (2, ("training.micro_batch_size=1",))  # a micro-batch is a sample


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """New ones for each test: what is mounted on a host stays there."""
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


def words(workspace: Workspace, layout: Layout, *more: str) -> list[str]:
    return [str(workspace.config("run")), *SETTINGS, *layout[1], *more]


def run_with(fault: str, code: int, hosts: TwoHosts, workspace: Workspace, *more: str) -> str:
    """The output of a run with a fault on beta; prints how long after it the ranks of both hosts had gone."""
    run = words(workspace, DATA_ACROSS, *more)
    started = start_ranks(hosts, run, "support.planted_entry", FAULT=fault, **FINDS_SUPPORT)
    wait_for_end(started)
    gone = time.time()
    output = finish(started, code)
    (broken,) = re.findall(rf"^{MARK}(\S+)$", output, re.MULTILINE)
    print(f"{fault}: all ranks have gone after {gone - float(broken):.1f} s")  # the figures of launchers/README.md
    assert gone - float(broken) < 30 or code == 0
    return output


def wait_for_end(started: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 150
    while any(one.poll() is None for one in started):
        assert time.monotonic() < deadline, "a host does not end"
        time.sleep(0.01)


def errors(output: str) -> list[str]:
    found = [line for line in output.splitlines() if line.startswith("error")]
    print("\n".join(found))
    return found


def go_on(hosts: TwoHosts, workspace: Workspace, one_host: OneHostRuns, layout: Layout, step: int) -> None:
    """The same command goes on from the checkpoint of this step and ends with the losses of one host."""
    output = finish(start_ranks(hosts, words(workspace, layout)), 0)
    assert re.search(rf"resumed from \S+step_{step:08}", output), output[-3000:]
    one_host.check(workspace.scratch / "run", layout)


def test_a_nan_in_one_sample_of_one_host(hosts: TwoHosts, workspace: Workspace, one_host: OneHostRuns) -> None:
    (line,) = errors(run_with("nan", 2, hosts, workspace))
    # some of DeepSpeed's classes say inf
    assert re.match(rf"error: gradient norm is (nan|inf) at optimizer step {STEP}: ", line)
    go_on(hosts, workspace, one_host, DATA_ACROSS, 10)


def test_a_nan_in_one_sample_of_one_host_is_skipped(hosts: TwoHosts, workspace: Workspace) -> None:
    run = workspace.scratch / "run"
    assert not errors(run_with("nan", 0, hosts, workspace, "training.non_finite=skip"))
    (skipped,) = map(json.loads, (run / "skipped.jsonl").read_text().splitlines())
    assert skipped["step"] == STEP
    assert skipped["by"] == "loss"
    assert len(skipped["samples"]) == 1
    assert records(run)[-1]["step"] == 30
    assert records(run)[-1]["train/skipped_steps"] == 1


def test_a_flipped_bit_in_the_weights_of_one_host(hosts: TwoHosts, workspace: Workspace, one_host: OneHostRuns) -> None:
    (line,) = errors(run_with("bit", 1, hosts, workspace, "training.weights_check_interval=1"))
    assert f"after step {STEP} " in line
    assert "is not the same on rank 0 (alpha) and rank 1 (beta)" in line
    go_on(hosts, workspace, one_host, DATA_ACROSS, 10)


def test_a_disk_that_all_hosts_share_and_that_fills_up(
    tmp_path_factory: pytest.TempPathFactory, workspace: Workspace, one_host: OneHostRuns
) -> None:
    run, ranks = workspace.scratch / "run", PIPELINE_ACROSS[0]
    run.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", run], check=True
    )  # before the hosts: both have it
    try:
        with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
            started = start_host_scripts(hosts, words(workspace, PIPELINE_ACROSS), ranks)
            wait_for(lambda: (run / "checkpoints" / "step_00000010" / "manifest.json").is_file(), started[0])
            fill(run, but=1 << 17)  # logs still have room
            wait_for(lambda: len(records(run)) >= 19, started[0])
            began = time.monotonic()
            wait_for_end(started)
            print(f"full disk: all ranks have gone {time.monotonic() - began:.1f} s after the step before the save")
            (line,) = errors(finish(started, 2))
            assert f"could not save step 20: {run}/checkpoints: 0." in line
            assert "earlier checkpoints are intact" in line
            assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000010"
            (run / "filler").unlink()
            go_on(hosts, workspace, one_host, PIPELINE_ACROSS, 10)
    finally:
        subprocess.run(["umount", run], check=True)


def fill(folder: Path, *, but: int) -> None:
    """Fill up the file system of a folder but for so many bytes."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)) == 1 << 16:
                pass
        except OSError:
            pass
        file.truncate(file.tell() - but)


def test_a_disk_that_is_full_on_one_host_alone(hosts: TwoHosts, workspace: Workspace) -> None:
    """As with a quota of one host. The other has room, and yet does not begin to save."""
    checkpoints = workspace.scratch / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    hosts.beta.check("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", checkpoints)
    output = finish(start_host_scripts(hosts, words(workspace, PIPELINE_ACROSS), PIPELINE_ACROSS[0]), 2)
    (line,) = errors(output)
    assert "could not save step 10: " in line
    assert "GB are free on beta (rank 1)" in line
    assert not list(checkpoints.glob("step_*"))
