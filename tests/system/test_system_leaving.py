"""`overtok train` that is asked to leave, by each way from outside: it saves, and its exit code says what is next."""

import signal

import pytest

from support.overtok_process import kill_session, start_overtok, wait_for
from support.workspace import Workspace, records


@pytest.mark.ci
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["SIGUSR1", "SIGTERM", "STOP"])
def test_the_command_leaves_with_the_code(workspace: Workspace, way: str) -> None:
    run = workspace.scratch / "run"
    process = start_overtok(
        "train",
        str(workspace.config("run")),
        "--processes",
        "2",
        "training.train_iters=100000",
        "checkpoint.interval=null",
    )
    try:
        wait_for(lambda: len(records(run)) >= 2, process)
        if way == "STOP":
            (run / "STOP").touch()
        else:
            process.send_signal(signal.Signals[way])
        output, _ = process.communicate(timeout=100)
    finally:
        kill_session(process)
    assert process.returncode == (143 if way == "SIGTERM" else 75), output
    assert output.count("asked to stop by ") == 1
    assert "is saved; the same command goes on from there" in output
    assert (run / "checkpoints" / "latest").is_file()
    assert not (run / "STOP").exists()
