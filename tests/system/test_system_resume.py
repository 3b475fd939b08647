"""A run that is killed in a save and started again prints what an uninterrupted run prints; kills elsewhere: see kills."""

from pathlib import Path

from conftest import Workspace, kill_session, losses, wait_for


def test_a_run_killed_while_it_saves_resumes_bit_for_bit(workspace: Workspace) -> None:
    code, output = workspace.run("train", str(workspace.config("whole")), "--processes", "2")
    assert code == 0, output
    expected = losses(workspace.scratch / "whole")
    assert [step for step, *_ in expected] == list(range(1, 13))

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
    assert "resumed from" in output
    assert "which an interrupted save left behind" in output
    assert losses(save_run) == expected
    assert not list(checkpoints.glob("*.partial"))
    assert kept(checkpoints) == ["step_00000008", "step_00000012"]


def kept(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("step_*"))
