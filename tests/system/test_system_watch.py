"""Ranks that die or hang: the job ends within the stated time, on every host, with a line that names the rank."""

import os
import re
import signal
import time

import pytest

from overtok_megatron.run_lock import RunLock
from support.overtok_process import kill_session, ranks_of, run_overtok, start_overtok, wait_for
from support.torchrun_pair import TorchrunPair, alive
from support.workspace import Workspace, losses, records

LONG = (
    "training.train_iters=1000000",
    "training.validation_interval=null",
    "checkpoint.interval=1000000",
    "training.global_batch_size=128",  # a step takes a tenth of a second
)
SHORT_LIMIT = "training.hang_timeout=8"  # the start may take twelve times that


def said(output: str, who: str = "watch") -> list[str]:
    return [line.split(f"[{who}] ", 1)[1] for line in output.splitlines() if f"[{who}] " in line]


def test_a_rank_that_is_killed_ends_the_job_in_one_line(workspace: Workspace) -> None:
    run = workspace.scratch / "run"
    process = start_overtok("train", str(workspace.config("run")), "--processes", "2", *LONG)
    try:
        wait_for(lambda: len(records(run)) >= 3, process)
        first, second = ranks_of(process)
        begin = time.monotonic()
        os.kill(second, signal.SIGKILL)
        while alive(first) or alive(second):
            assert time.monotonic() - begin < 30
            time.sleep(0.01)
        output, _ = process.communicate(timeout=60)
    finally:
        kill_session(process)
    assert process.returncode == 1, output
    death, gone = said(output)
    found = re.match(
        r"rank [01] on \S+ \(process (\d+)\) was ended by SIGKILL, last heard at step \d+, in phase", death
    )
    assert found is not None, death
    assert int(found[1]) == second
    assert death.endswith("; ending all ranks of the job")
    assert gone.startswith("all ranks have gone")
    assert "Traceback" not in output
    log = (run / "train.log").read_text()
    assert death in log
    for report in run.glob("death-*.txt"):  # where the peer had an error before it was told to leave
        assert f"(process {second})" in report.read_text()
        assert report.name in gone
    lock = RunLock(run, "a test")
    lock.take()
    lock.release()


@pytest.mark.ci
def test_a_rank_that_is_stopped_ends_the_job_with_stacks(workspace: Workspace) -> None:
    run = workspace.scratch / "run"
    process = start_overtok("train", str(workspace.config("run")), "--processes", "2", *LONG, SHORT_LIMIT)
    try:
        wait_for(lambda: len(records(run)) >= 5, process)
        ranks = ranks_of(process)
        begin = time.monotonic()
        os.kill(ranks[1], signal.SIGSTOP)
        output, _ = process.communicate(timeout=90)
        assert time.monotonic() - begin < 8 + 30
    finally:
        kill_session(process)
    assert process.returncode == 1, output
    hang, where, gone = said(output)
    assert re.match(rf"rank [01] on \S+ \(process {ranks[1]}\) hangs, last heard ", hang)
    assert hang.endswith("it does not answer (its process is stopped)")
    (report,) = run.glob("hang-*.txt")
    assert str(report) in where
    assert "1 of 2 ranks" in where
    assert gone == "all ranks have gone"
    text = report.read_text()
    assert "in _one_step" in text
    assert "does not answer (its process is stopped)" in text
    assert not any(map(alive, ranks))


@pytest.mark.ci
def test_one_signal_to_the_command_alone_saves_and_ends_the_run(workspace: Workspace) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        run = workspace.scratch / f"run-{number}"
        process = start_overtok("train", str(workspace.config(run.name)), "--processes", "2", *LONG)
        try:
            wait_for(lambda run=run: len(records(run)) >= 3, process)  # type: ignore[misc]
            os.kill(process.pid, number)
            output, _ = process.communicate(timeout=60)
        finally:
            kill_session(process)
        assert process.returncode == 143, output
        assert "asked to stop by " in output
        assert "Traceback" not in output
        assert not said(output)


@pytest.mark.ci
def test_a_second_interrupt_ends_the_run_at_once(workspace: Workspace) -> None:
    process = start_overtok("train", str(workspace.config("run")), "--processes", "2", *LONG, "--max-restarts", "3")
    try:
        wait_for(lambda: len(ranks_of(process)) == 2, process)
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert not ranks_of(process)
    finally:
        kill_session(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output


@pytest.mark.ci
def test_a_restarted_run_ends_as_one_that_was_never_interrupted(workspace: Workspace) -> None:
    code, output = run_overtok("train", str(workspace.config("whole")), "--processes", "2", "training.train_iters=30")
    assert code == 0, output
    run = workspace.scratch / "killed"
    command = ("train", str(workspace.config("killed")), "--processes", "2", "training.train_iters=30")
    process = start_overtok(*command, "training.resume=never", "--max-restarts", "2")
    try:
        for checkpoint in (4, 12):
            wait_for((run / f"checkpoints/step_{checkpoint:08}/manifest.json").is_file, process)
            os.kill(ranks_of(process)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=150)
    finally:
        kill_session(process)
    assert process.returncode == 0, output
    assert losses(run) == losses(workspace.scratch / "whole")
    first, second = said(output, "supervisor")
    assert first.startswith("start 1 of at most 3 ended with code ")
    assert second.startswith("start 2 of at most 3 ended with code ")


@pytest.mark.ci
def test_a_run_that_diverges_is_not_tried_again(workspace: Workspace) -> None:
    """All ranks leave with 2, as after every mistake that a user can mend and a restart cannot."""
    code, output = run_overtok(
        "train", str(workspace.config("run")), "--processes", "2", "--max-restarts", "3", "optimizer.learning_rate=1e38"
    )
    assert code == 2, output
    assert len([line for line in output.splitlines() if line.startswith("error")]) == 1, output
    assert not said(output, "supervisor") + said(output)


def watched(workspace: Workspace, *overrides: str, **options: str) -> TorchrunPair:
    return TorchrunPair(workspace.config("run"), workspace.scratch / "run", *LONG, *overrides, **options)


@pytest.mark.ci
@pytest.mark.parametrize("host", [0, 1])
def test_two_hosts_end_when_a_rank_is_killed(workspace: Workspace, host: int) -> None:
    with watched(workspace) as job:
        job.train_until(5)
        os.kill(job.ranks[host], signal.SIGKILL)
        assert job.seconds_until_gone(30) < 30
        death, *_ = job.watch_lines()
        assert f"(process {job.ranks[host]}) was ended by SIGKILL" in death
        assert len(job.watch_lines()) <= 2
        assert "gloo" not in "".join(job.lines)


@pytest.mark.ci
def test_two_hosts_end_when_a_rank_computes_forever(workspace: Workspace) -> None:
    with watched(workspace, SHORT_LIMIT, module="support.stuck_entry") as job:
        job.train_until(3)
        job.seconds_until_gone(8 + 30)
        hang, where, *_ = job.watch_lines()
        assert hang.startswith("rank 1 on ")
        assert "at step 4, in phase 'step'" in hang
        assert "it is in stuck (" in hang
        assert "stacks of 2 of 2 ranks" in where
        (report,) = job.run.glob("hang-*.txt")
        assert "stuck_entry.py" in report.read_text()


@pytest.mark.ci
@pytest.mark.parametrize("host", [0, 1])
def test_two_hosts_end_when_a_watchdog_is_killed(workspace: Workspace, host: int) -> None:
    with watched(workspace) as job:
        job.train_until(5)
        os.kill(job.watchdogs[host], signal.SIGKILL)
        job.seconds_until_gone(30)
        ours, theirs = job.watch_lines()[:2]
        assert "the watchdog of" in ours
        assert ("first host has not been heard" if host == 0 else "is lost: its watchdog's connection") in theirs


@pytest.mark.ci
@pytest.mark.parametrize("host", [0, 1])
def test_two_hosts_end_when_one_is_not_heard_any_more(workspace: Workspace, host: int) -> None:
    """The watchdog is stopped: its connection stays open and silent, as when a link is cut."""
    with watched(workspace) as job:
        job.train_until(5)
        os.kill(job.watchdogs[host], signal.SIGSTOP)
        job.seconds_until_gone(30)
        line, *_ = job.watch_lines()
        assert "has not been heard for 2" in line
