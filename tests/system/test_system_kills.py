"""Kills at random moments, of one rank or of all, in steps and in saves: what resumes ends with the same bits."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from overtok_megatron.checkpoint.store import CheckpointStore, verify_checkpoint
from support.overtok_process import kill_session, ranks_of, run_overtok, start_overtok
from support.workspace import Workspace, losses, records

OVERRIDES = ("training.train_iters=30", "checkpoint.interval=2", "checkpoint.incremental=3", "checkpoint.keep_last=2")


def wait_until_mid(kind: str, run: Path, dice: random.Random) -> bool:
    """Wait for a random moment of a kind; False where the run ended first."""
    begin = time.monotonic()
    seen, further = len(records(run)), dice.randint(1, 6)
    while time.monotonic() - begin < 90:
        if kind == "in a save":
            there = any((run / "checkpoints").glob("*.partial")) and len(records(run)) > seen
        else:
            there = len(records(run)) >= seen + further
        if there:
            time.sleep(dice.random() * (0.06 if kind == "in a save" else 0.3))
            return True
        if (run / "checkpoints" / "step_00000030").is_dir():
            return False
        time.sleep(0.001)
    pytest.fail("the run did not get anywhere")


def kill_and_resume(workspace: Workspace, kills: int, seed: int) -> None:
    dice = random.Random(seed)

    def command(name: str) -> tuple[str, ...]:
        return ("train", str(workspace.config(name)), "--processes", "2", *OVERRIDES)

    code, output = run_overtok(*command("whole"))
    assert code == 0, output
    expected = losses(workspace.scratch / "whole")
    done, number = 0, 0
    while done < kills:
        number += 1
        run = workspace.scratch / f"killed-{number}"
        while done < kills:
            process = start_overtok(*command(run.name))
            kind = dice.choice(["one rank", "all ranks", "in a save"])
            if not wait_until_mid(kind, run, dice):
                process.communicate(timeout=60)
                break
            if kind == "one rank":
                for rank in dice.sample(ranks_of(process), k=min(1, len(ranks_of(process)))):
                    os.kill(rank, signal.SIGKILL)
                process.communicate(timeout=60)
            kill_session(process)
            done += 1
            latest = CheckpointStore(run).latest()
            if latest is not None:
                verify_checkpoint(latest)
        code, output = run_overtok(*command(run.name))
        assert code == 0, output
        assert losses(run) == expected, f"seed {seed}, run {number}"
        assert not list((run / "checkpoints").glob("*.partial*"))


@pytest.mark.slow  # test_system_resume.py has the two kinds of kill, each once
@pytest.mark.timeout(1800)
def test_fifty_random_kills(workspace: Workspace) -> None:
    kill_and_resume(workspace, kills=50, seed=time.time_ns())
