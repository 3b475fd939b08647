"""A run that is killed in a save and started again prints what an uninterrupted run prints; kills elsewhere: see kills."""

from pathlib import Path

import pytest

from support.overtok_process import kill_session, run_overtok, start_overtok, wait_for
from support.workspace import Workspace, losses, records


@pytest.mark.ci
def test_a_run_killed_while_it_saves_resumes_bit_for_bit(workspace: Workspace) -> None:
    sets = ", ".join(
        f"{{path: {workspace.data}/{name}, weight: {weight}}}" for name, weight in (("train", 3), ("validation", 1))
    )
    how = (f"data.train=[{sets}]", "--processes", "2")
    code, output = run_overtok("train", str(workspace.config("whole")), *how)
    assert code == 0, output
    expected = losses(workspace.scratch / "whole")
    assert [step for step, *_ in expected] == list(range(1, 13))

    save_run = workspace.scratch / "save"
    command = ("train", str(workspace.config("save")), *how)
    process = start_overtok(*command)
    checkpoints = save_run / "checkpoints"
    second = checkpoints / "step_00000008.partial"
    wait_for(lambda: any(second.glob("tables/*")), process)
    kill_session(process)  # all ranks, while they write
    assert second.exists()
    assert (checkpoints / "latest").read_text() == "step_00000004"
    code, output = run_overtok(*command)
    assert code == 0, output
    assert "resumed from" in output
    assert "which an interrupted save left behind" in output
    assert losses(save_run) == expected
    last, whole = records(save_run)[-1], records(workspace.scratch / "whole")[-1]
    for name in ("train", "validation"):
        assert last[f"data/epoch/{name}"] == whole[f"data/epoch/{name}"] > 0
    assert not list(checkpoints.glob("*.partial"))
    assert kept(checkpoints) == ["step_00000008", "step_00000012"]


def kept(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("step_*"))
