"""Runs that are killed and started again print what an uninterrupted run prints, bit for bit."""

import os
import signal
from pathlib import Path

from conftest import Workspace, kill_session, losses, ranks_of, records, wait_for


def test_killed_runs_resume_bit_for_bit(workspace: Workspace) -> None:
    code, output = workspace.run("train", str(workspace.config("whole")), "--processes", "2")
    assert code == 0, output
    expected = losses(workspace.scratch / "whole")
    assert [step for step, *_ in expected] == list(range(1, 13))

    step_run = workspace.scratch / "step"
    command = ("train", str(workspace.config("step")), "--processes", "2")
    process = workspace.start(*command)
    wait_for(lambda: len(records(step_run)) >= 6, process)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)  # one rank, in the middle of a step: the launcher ends the others
    process.communicate(timeout=60)
    assert process.returncode != 0
    kill_session(process)
    code, output = workspace.run(*command)
    assert code == 0, output
    assert "resumed from" in output
    assert losses(step_run) == expected

    save_run = workspace.scratch / "save"
    command = ("train", str(workspace.config("save")), "--processes", "2")
    process = workspace.start(*command)
    checkpoints = save_run / "checkpoints"
    second = checkpoints / "step_00000008.partial"
    wait_for(lambda: any(second.glob("tables/*")), process)
    kill_session(process)  # all ranks, while they write
    assert second.exists()
    assert (checkpoints / "latest").read_text() == "step_00000004"
    code, output = workspace.run(*command)
    assert code == 0, output
    assert "which an interrupted save left behind" in output
    assert losses(save_run) == expected
    assert not list(checkpoints.glob("*.partial"))
    assert kept(checkpoints) == ["step_00000008", "step_00000012"]


def kept(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("step_*"))
