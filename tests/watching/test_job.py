"""What the job's watch concludes from reports: who died, who hangs, who is lost, and in which words; on a clock of the test."""

import re
from pathlib import Path
from typing import Any

import pytest

from overtok_megatron.watching.clock import RunningClock
from overtok_megatron.watching.hang_report import culprits, waits_for_others
from overtok_megatron.watching.job import PHASES, JobWatch

IN_COLLECTIVE = """thread MainThread:
  File "/x/training/engine.py", line 3, in step
    all_reduce(x)
  File "/x/torch/distributed/distributed_c10d.py", line 9, in all_reduce
    work.wait()
"""
COMPUTING = """thread MainThread:
  File "/x/training/engine.py", line 7, in step
    compute()

thread tokens:
  File "/x/torch/distributed/distributed_c10d.py", line 9, in broadcast
    work.wait()
"""


class Clock(RunningClock):
    seconds = 100.0

    def now(self) -> float:
        return self.seconds


class Job:
    """A watch over ranks 0 and 1 on host `a` and rank 2 on host `b`, with what it said and ordered."""

    def __init__(self, folder: Path, hang_timeout: float | None = 10.0) -> None:
        self.clock = Clock()
        self.said: list[str] = []
        self.orders: list[dict[str, Any]] = []
        self.watch = JobWatch(
            expected=3, hang_timeout=hang_timeout, folder=folder, clock=self.clock,
            command=self.orders.append, say=self.said.append,
        )  # fmt: skip
        self.beats = {rank: beat() for rank in range(3)}

    def report(self, *hosts: str, **changes: Any) -> None:
        """Reports of these hosts; changes: of the last rank of the last of them."""
        for host in hosts:
            ranks = [alive(rank, self.beats[rank]) for rank in ((0, 1) if host == "a" else (2,))]
            if host == hosts[-1]:
                ranks[-1] |= changes
            self.watch.receive(f"watchdog of {host}", host, ranks)

    def pass_time(self, seconds: int, *reporting: str) -> None:
        """Each second these hosts report, and the phases go on."""
        for _ in range(seconds):
            self.clock.seconds += 1
            for one in self.beats.values():
                one["seconds"] += 1
            self.report(*reporting)
            self.watch.tick()


def beat(phase: str = "step", step: int = 4, **others: Any) -> dict[str, Any]:
    return {"phase": phase, "step": step, "seconds": 0.0, "collectives": [], **others}


def alive(rank: int, its_beat: dict[str, Any]) -> dict[str, Any]:
    return {"rank": rank, "pid": 1000 + rank, "process": "its process waits", "state": "alive", "how": "", "code": None,
            "why": "", "said": False, "beat": dict(its_beat), "age": 0.0}  # fmt: skip


def test_a_death_is_said_once_and_ends_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.report("a", "b")
    job.beats[2] |= {"collectives": [("tables: all-to-all of ids", 0.5)], "seconds": 0.75}
    job.report("b", state="died", how="was ended by SIGSEGV", process="")
    job.report("a", state="died", how="was ended by SIGKILL", process="")
    job.pass_time(40)
    assert job.said == [
        "rank 2 on b (process 1002) was ended by SIGSEGV, last heard at step 4, in phase 'step' for 0.8 s, in tables: "
        "all-to-all of ids for 0.5 s; ending all ranks of the job"
    ]
    assert job.orders == [{"type": "leave", "code": 1}]


@pytest.mark.parametrize(
    ("code", "orders", "lines"),
    [
        (0, [], 0),
        (143, [], 0),
        (75, [], 0),
        (2, [{"type": "leave", "code": 2}], 0),
        (1, [{"type": "leave", "code": 1}], 1),
    ],
)
def test_codes_with_which_a_rank_leaves(tmp_path: Path, code: int, orders: list[dict[str, Any]], lines: int) -> None:
    """With 2 it has said itself what the user can mend."""
    job = Job(tmp_path)
    job.report("a", "b", state="left", code=code, why="RuntimeError: odd", said=code == 2)
    assert job.orders == orders
    job.report("a", state="left", code=0, process="")
    for host, ranks in {"a": (0, 1), "b": (2,)}.items():
        job.watch.receive(f"watchdog of {host}", host, [alive(rank, beat()) | {"process": ""} for rank in ranks])
    job.watch.finish()
    assert len(job.said) == 2 * lines  # and the last of them, that all have gone
    assert all("left with exit code 1 (RuntimeError: odd)" in line for line in job.said[:1])


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_has_its_own_limit(tmp_path: Path, phase: str) -> None:
    job = Job(tmp_path)
    job.beats = {rank: beat(phase) for rank in range(3)}
    job.pass_time(10 * PHASES[phase], "a", "b")
    assert not job.orders
    job.pass_time(1, "a", "b")
    assert job.orders == [{"type": "stacks"}]


def test_a_hang_names_the_rank_that_does_not_answer(tmp_path: Path) -> None:
    """Its reports go on coming from its watchdog, with a beat that grows old."""
    job = Job(tmp_path)
    job.pass_time(11, "a", "b")
    for rank in (0, 2):
        job.watch.receive_text(rank, IN_COLLECTIVE)
    job.pass_time(6, "a", "b")
    hang, where = job.said
    assert hang == (
        "rank 1 on a (process 1001) hangs, last heard at step 4, in phase 'step' for 17.0 s (10 s are allowed): it does not "
        "answer (its process waits)"
    )
    (report,) = tmp_path.glob("hang-*.txt")
    assert re.fullmatch(rf"stacks of 2 of 3 ranks are in {report}; ending all ranks of the job", where)
    assert report.read_text().count("in all_reduce") == 2
    assert job.orders[-1] == {"type": "leave", "code": 1}


def test_when_all_have_answered_nothing_is_waited_for(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.pass_time(11, "a", "b")
    for rank, text in enumerate([IN_COLLECTIVE, IN_COLLECTIVE, COMPUTING]):
        job.watch.receive_text(rank, text)
    job.watch.tick()
    assert job.said[0].endswith("it is in step (/x/training/engine.py:7)")
    assert job.said[0].startswith("rank 2 ")


def test_without_a_limit_nothing_hangs(tmp_path: Path) -> None:
    job = Job(tmp_path, hang_timeout=None)
    job.pass_time(5000, "a", "b")
    assert not job.orders


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for second in range(127):
        job.beats = {rank: beat("start", seconds=float(second % 5)) for rank in range(3)}
        job.pass_time(1, "a")
    assert job.said[0] == "rank 2 has not reached its watchdog within 120 s of the start"
    assert "rank 2 has never been heard" in next(tmp_path.glob("hang-*.txt")).read_text()


def test_a_rank_that_had_agreed_to_begin_and_never_comes(tmp_path: Path) -> None:
    """A start may take an hour; a rank that was there and has died since is not waited for that long."""
    job = Job(tmp_path, hang_timeout=None)
    job.pass_time(10, "a")
    job.watch.all_come()
    job.pass_time(119, "a")
    assert not job.orders
    job.pass_time(10, "a")
    assert job.said[0] == "rank 2 has not reached its watchdog within 130 s of the start"


def test_a_silent_host_is_lost(tmp_path: Path) -> None:
    job = Job(tmp_path, hang_timeout=None)
    job.report("a", "b")
    job.pass_time(20, "a")
    assert not job.said
    job.pass_time(1, "a")
    (line,) = job.said
    assert line.startswith(
        "host b (ranks 2) has not been heard for 21 s; rank 2 was last heard at step 4, in phase 'step' for 21"
    )


def test_a_failure_is_explained_by_a_host_that_is_disconnected(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.report("a", "b")
    job.watch.rank_failed()
    job.watch.disconnected("watchdog of b")
    assert not job.said
    job.report("b")  # it is back
    job.watch.rank_failed()
    assert not job.said
    job.watch.disconnected("watchdog of b")
    job.watch.rank_failed()
    assert "host b (ranks 2) is lost: its watchdog's connection has ended" in job.said[0]


def test_the_end_of_a_job(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.report("a", "b", state="died", how="died", process="")
    job.watch.receive_text(0, "Traceback of rank 0")
    assert not job.watch.all_gone
    for rank in (0, 1):
        job.watch.receive("watchdog of a", "a", [alive(rank, job.beats[rank]) | {"process": ""}])
    assert job.watch.all_gone
    job.watch.finish()
    (report,) = tmp_path.glob("death-*.txt")
    assert job.said[-1] == f"all ranks have gone; what the other ranks raised is in {report}"
    assert "Traceback of rank 0" in report.read_text()


def test_who_made_the_others_wait() -> None:
    beats = {rank: beat() for rank in range(3)}
    assert waits_for_others(IN_COLLECTIVE)
    assert not waits_for_others(COMPUTING)  # its thread for tokens waits, as it may
    assert culprits(beats, {0: IN_COLLECTIVE}) == [1, 2]
    assert culprits(beats, {0: IN_COLLECTIVE, 1: COMPUTING, 2: IN_COLLECTIVE}) == [1]
    all_wait = dict.fromkeys(range(3), IN_COLLECTIVE)
    assert culprits(beats, all_wait) == [0, 1, 2]
    assert culprits(beats | {2: beat(step=3)}, all_wait) == [2]


def test_a_clock_stands_still_while_its_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = RunningClock()
    begin = clock.now()
    for gap in (1.0, 4.0, 3600.0, 1.0):
        now += gap
        clock.tick()
    assert clock.now() - begin == 6.0
