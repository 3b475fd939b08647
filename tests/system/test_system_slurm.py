"""Runs that SLURM starts, on a cluster of two hosts: by srun, and by the template, whose job is queued again in mid-run."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overtok_megatron.launching.local import ENTRY
from support.host_runs import PIPELINE_ACROSS, SETTINGS, TENSOR_INSIDE, VARIABLES, OneHostRuns
from support.namespaces import reason_to_skip
from support.slurm import PROGRAMS, Slurm, slurm_cluster
from support.workspace import Workspace, records

TEMPLATE = Path(__file__).parents[2] / "launchers" / "slurm.sbatch"

pytestmark = [
    pytest.mark.ci,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(reason := reason_to_skip(*PROGRAMS)), reason=reason or ""),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def test_srun(slurm: Slurm, workspace: Workspace, one_host: OneHostRuns) -> None:
    ranks, overrides = TENSOR_INSIDE
    tasks = ["srun", "--nodes=2", f"--ntasks={ranks}"]
    command = [sys.executable, "-m", ENTRY, workspace.config("run"), *SETTINGS, *overrides]
    slurm.check(*tasks, *command, **VARIABLES)
    one_host.check(workspace.scratch / "run", TENSOR_INSIDE)


def test_job_is_queued_again_and_goes_on(slurm: Slurm, workspace: Workspace, one_host: OneHostRuns) -> None:
    """SIGUSR1 comes as --signal=B:USR1@120 sends it: to the script of the job alone."""
    ranks, overrides = PIPELINE_ACROSS
    run, log = workspace.scratch / "run", workspace.scratch / "job.log"
    options = ["--parsable", f"--ntasks-per-node={ranks // 2}", "--gpus-per-node=2", f"--output={log}"]
    command = [TEMPLATE, workspace.config("run"), *SETTINGS, *overrides]
    job = slurm.check("sbatch", *options, *command, PYTHON=sys.executable, **VARIABLES).strip()
    assert slurm.job(job)["Requeue"] == "1"
    wait_for_step(slurm, job, run, log)
    slurm.check("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for_job(job, "PENDING")
    assert "queued again" in log.read_text()
    assert 0 < len(records(run)) < 30
    ended = slurm.wait_for_job(job, "COMPLETED")
    assert (ended["Restarts"], ended["ExitCode"]) == ("1", "0:0")
    assert "resumed from" in log.read_text()
    one_host.check(run, PIPELINE_ACROSS)


def wait_for_step(slurm: Slurm, job: str, run: Path, log: Path) -> None:
    """Until the run has reported a step."""
    deadline = time.monotonic() + 120
    while not records(run):
        assert time.monotonic() < deadline, f"no step within two minutes:\n{log.read_text() if log.exists() else ''}"
        assert slurm.job(job)["JobState"] in ("PENDING", "RUNNING"), log.read_text()
        time.sleep(0.05)
