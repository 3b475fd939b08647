"""A run's folder has one writer: a second command is refused in one line, and nothing of the first one changes."""

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest

from overtok_megatron.checkpoint.store import CheckpointStore
from overtok_megatron.cli import main
from support.overtok_process import kill_session, ranks_of, start_overtok, wait_for
from support.workspace import Workspace, records


def digests(run: Path) -> dict[str, str]:
    """Of what a second writer would change first."""
    files = [run / "config.yaml", *(run / "checkpoints").glob("step_00000004/*.json")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_other_writers_are_refused_while_a_training_lives(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """As long as its command lives, and when that is killed as long as a rank does; then its run can be gone on with."""
    config, run = workspace.config("run"), workspace.scratch / "run"
    process = start_overtok(
        "train", str(config), "--processes", "2", "training.train_iters=1000000", "checkpoint.keep_last=1000000"
    )
    try:
        wait_for(lambda: (run / "checkpoints/step_00000004/manifest.json").is_file(), process)
        before, ranks = digests(run), ranks_of(process)

        def refused(holder: int, work: str) -> None:
            for command in (
                ("train", str(config), "--processes", "1", "optimizer.learning_rate=0.1"),
                ("checkpoint", "reshape", str(run / "checkpoints/step_00000004")),
                ("checkpoint", "prune", str(run), "--keep-last", "1"),
            ):
                assert main(command) == 2
                (line,) = capsys.readouterr().err.splitlines()
                assert line.startswith(f"error: {run}: in use by process {holder} on {os.uname().nodename} ({work})")
                assert len(line) <= 300
            assert digests(run) == before
            assert main(("checkpoint", "inspect", str(run / "checkpoints/step_00000004"))) == 0  # readers come in
            capsys.readouterr()

        refused(process.pid, "overtok train")
        os.kill(process.pid, signal.SIGKILL)  # the command alone
        process.wait()
        done = len(records(run))
        refused(min(ranks), "the first rank of a training")
        assert len(records(run)) >= done > 0
    finally:
        kill_session(process)
    deadline = time.monotonic() + 20
    while main(("checkpoint", "prune", str(run), "--keep-last", "1")):  # the kernel is still taking the ranks away
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert CheckpointStore(run).latest() is not None
    assert not (run / ".lock").exists()
