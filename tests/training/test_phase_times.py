"""Times of phases: every moment counts once, on the host and on a device; and which rank they make late."""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from overtok_megatron.parallel import spans
from overtok_megatron.parallel.grid import GridShape
from overtok_megatron.parallel.worker import Worker
from overtok_megatron.training import phase_times
from overtok_megatron.training.phase_times import (
    COMPUTE,
    DATA,
    EXCHANGE,
    PHASES,
    REST,
    SAVE,
    UPDATE,
    DeviceTimes,
    PhaseTimes,
    RankTimes,
)
from overtok_megatron.training.straggler_report import StragglerReport, compared_groups, late_ranks

CPU = torch.device("cpu")


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Waited:
    """A collective that takes some seconds of a clock."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds

    def wait(self) -> None:
        self._clock.now += self._seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (phase_times, spans):
        monkeypatch.setattr(module, "time", clock)
    return clock


def a_step(times: PhaseTimes, clock: Clock) -> None:
    """Busy: 1 s with data, 2.5 s computing, 4 s with the update, 0.25 s otherwise. 6 s waiting, 1.25 s not compared."""
    with times.phase(DATA):
        clock.now += 1
    with times.phase(COMPUTE):
        clock.now += 2
        with times.phase(EXCHANGE):
            spans.wait_for(Waited(clock, 3), "outer")  # type: ignore[arg-type]
        times.enter(UPDATE)
        clock.now += 4
        times.leave()
        with spans._Span("outer"):
            clock.now += 1
            spans.wait_for(Waited(clock, 2), "inner")  # type: ignore[arg-type]
        clock.now += 0.5
    with times.phase(None):
        clock.now += 1.25
    clock.now += 0.25


def test_every_moment_of_a_step_counts_once(clock: Clock) -> None:
    times = PhaseTimes(CPU, 4)
    a_step(times, clock)  # the first step is not measured
    assert times.take().steps == 0
    for step in (2, 3):
        times.begin_step(step)
        a_step(times, clock)
    with times.phase(SAVE):
        clock.now += 8
    times.begin_step(4)
    with times.phase(DATA):
        clock.now += 7
    found = times.take()
    assert found.steps == 2
    assert found.waited == 6
    assert found.busy == dict.fromkeys(PHASES, 0.0) | {DATA: 1, COMPUTE: 2.5, UPDATE: 4, REST: 0.25, SAVE: 4}
    assert RankTimes.of_numbers(found.numbers()) == found
    times.begin_step(5)
    assert times.take().busy[DATA] == 7, "a step that went on at a report belongs to the next one"
    assert [step for step in range(1, 10) if times.due(step)] == [4, 8]


def test_nothing_is_measured_where_reports_are_off(clock: Clock) -> None:
    times = PhaseTimes(CPU, None)
    for step in (2, 3):
        times.begin_step(step)
        a_step(times, clock)
    assert times.take().total_busy == 0
    assert not any(times.due(step) for step in range(10))


def test_who_waits_for_a_thread_that_waits_for_others_waits() -> None:
    """0.3 s of the thread's work are this rank's, and the 0.4 s of its collective are not."""

    class Sleeping:
        def wait(self) -> None:
            time.sleep(0.4)

    def job() -> None:
        time.sleep(0.3)
        spans.wait_for(Sleeping(), "a collective")  # type: ignore[arg-type]

    worker, before = Worker("test", CPU), spans.seconds_waited(time.monotonic())
    worker.result(worker.submit(job))
    worker.wait()
    waited = spans.seconds_waited(time.monotonic()) - before
    assert 0.38 < waited < 0.65


def test_spans_within_spans_are_named_and_end_with_an_error() -> None:
    class Failing:
        def wait(self) -> None:
            assert [name for name, _ in spans.under_way()] == ["inner"]
            raise RuntimeError

    with spans._Span("outer"):
        with pytest.raises(RuntimeError):
            spans.wait_for(Failing(), "inner")  # type: ignore[arg-type]
        assert [name for name, _ in spans.under_way()] == ["outer"]
    assert not spans.under_way()


class Event:
    """Of a device that does its work at once, or not so far."""

    done = True

    def __init__(self, now: float) -> None:
        self.now = now

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, other: "Event") -> float:
        assert self.done, "a wait for the device"
        return 1000 * (other.now - self.now)


def test_a_device_is_timed_by_events_which_nobody_waits_for(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    times, recorded = PhaseTimes(CPU, 20), 0

    def record() -> Any:
        nonlocal recorded
        recorded += 1
        return Event(clock.now)

    times._device = DeviceTimes(record)
    for step in range(2, 20):
        times.begin_step(step)
        if step == 10:
            assert recorded == 1, "nothing is recorded but in the last ten steps before a report"
        a_step(times, clock)
    monkeypatch.setattr(Event, "done", False)
    times.begin_step(20)  # the device has not passed the end of step 19
    monkeypatch.setattr(Event, "done", True)
    found = times.take()
    assert found.steps == 10
    assert found.waited == 6
    assert found.busy == dict.fromkeys(PHASES, 0.0) | {DATA: 1, COMPUTE: 2.5, UPDATE: 4, REST: 0.25}
    for step in range(21, 40):
        times.begin_step(step)
        a_step(times, clock)
    monkeypatch.setattr(Event, "done", False)
    times.begin_step(40)
    assert times.take().steps == 9, "a step that the device has not finished is left out"
    times.stop()


def test_spans_of_threads_beside_the_training_are_not_timed_on_the_device() -> None:
    events: list[str] = []

    class Seen:
        def begins(self) -> None:
            events.append("begins")

        def ends(self) -> None:
            events.append("ends")

    def span() -> None:
        with spans._Span("one"), spans._Span("within"):
            pass

    spans.observe(Seen())
    try:
        worker = Worker("test", CPU)
        worker.result(worker.submit(span))
        assert not events
        backward = threading.Thread(target=span)  # as autograd's on a GPU
        backward.start()
        backward.join()
        span()
    finally:
        spans.observe(None)
    span()
    assert events == ["begins", "ends"] * 2


@dataclass(frozen=True)
class Grid:
    """What a report asks of a grid of ranks on three hosts."""

    shape: GridShape
    rank: int = 0

    def gather_objects(self, _: str) -> list[str]:
        return [f"host{rank % 3}" for rank in range(self.shape.world_size)]


def ranks(*busy: dict[str, float], step: float = 1.0) -> dict[int, RankTimes]:
    """Times of ranks in steps of so many seconds, the rest of which they wait."""
    return {
        rank: RankTimes(steps=5, waited=step - sum(own.values()), busy=dict.fromkeys(PHASES, 0.0) | own)
        for rank, own in enumerate(busy)
    }


def test_the_rank_that_waits_least_is_late() -> None:
    shape = GridShape(data=4)
    fast, slow = {COMPUTE: 0.5, DATA: 0.01}, {COMPUTE: 0.52, DATA: 0.2}
    (late,) = late_ranks(ranks(fast, fast, slow, fast), shape, 0.05)
    assert (late.rank, late.phase, late.others, late.stage) == (2, DATA, 3, None)
    assert late.seconds == pytest.approx(0.21)
    assert late.phase_seconds == pytest.approx(0.19)
    assert late.step_seconds == pytest.approx(1)
    assert not late_ranks(ranks(fast, fast, slow, fast), shape, 0.22)
    assert not late_ranks(ranks(fast, fast, fast, fast), shape, 0.05)
    assert not late_ranks(ranks(slow, slow, slow, slow), shape, 0.05)
    slower = slow | {COMPUTE: 0.6}
    assert [late.rank for late in late_ranks(ranks(slow, fast, fast, slower, fast), GridShape(data=5), 0.05)] == [3, 0]


def test_a_rank_for_which_nobody_waits_is_not_late() -> None:
    """It is busy with what nobody needs, as a rank that waits outside of spans seems to be."""
    times = ranks({COMPUTE: 0.5}, {COMPUTE: 0.5}, {COMPUTE: 0.9})
    times[2] = RankTimes(steps=5, waited=0.5, busy=times[2].busy)
    assert not late_ranks(times, GridShape(data=3), 0.05)


def test_differences_of_milliseconds_are_not_named() -> None:
    times = ranks({COMPUTE: 0.006}, {COMPUTE: 0.010}, step=0.010)
    assert not late_ranks(times, GridShape(data=2), 0.05)
    assert late_ranks(ranks({COMPUTE: 0.006}, {COMPUTE: 0.012}, step=0.012), GridShape(data=2), 0.05)


def test_a_rank_that_measured_nothing_is_left_out() -> None:
    times = ranks({COMPUTE: 0.2}, {COMPUTE: 0.8}, {COMPUTE: 0.2})
    times[0] = RankTimes(steps=0, waited=0.0, busy=dict.fromkeys(PHASES, 0.0))
    assert [late.rank for late in late_ranks(times, GridShape(data=3), 0.05)] == [1]
    assert not late_ranks({0: times[0], 1: times[1]}, GridShape(data=2), 0.05)


def test_ranks_are_compared_with_those_of_their_stage() -> None:
    assert compared_groups(GridShape(pipe=2, data=2)) == [[0, 1], [2, 3]]
    assert compared_groups(GridShape(pipe=2, tensor=2)) == [[0, 1], [2, 3]]
    assert compared_groups(GridShape(pipe=3)) == [[0, 1, 2]]
    first, last = {COMPUTE: 0.4}, {COMPUTE: 0.9}
    assert not late_ranks(ranks(first, first, last, last), GridShape(pipe=2, data=2), 0.05)
    (late,) = late_ranks(ranks(first, {COMPUTE: 0.5}, last, last), GridShape(pipe=2, data=2), 0.05)
    assert (late.rank, late.stage) == (1, None)
    (late,) = late_ranks(ranks(first, first, last), GridShape(pipe=3), 0.05)
    assert (late.rank, late.stage) == (2, 2)


def test_what_was_said_is_not_said_again_until_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    report = StragglerReport(Grid(GridShape(data=12)), 100, 0.05)  # type: ignore[arg-type]
    caplog.set_level(logging.WARNING)

    def said(*late: dict[str, float]) -> list[str]:
        caplog.clear()
        times = ranks(*late, *([{COMPUTE: 0.3}] * (12 - len(late))))
        values = report.judge([times[rank].numbers() for rank in sorted(times)])
        assert values["stragglers/late_rank"] == (
            max(range(len(late)), key=lambda rank: late[rank][DATA]) if late else -1
        )
        assert values["stragglers/busy_seconds_median"] == pytest.approx(0.3)
        return [record.getMessage() for record in caplog.records]

    slow = {COMPUTE: 0.3, DATA: 0.1}
    assert not said()
    assert said(slow) == [
        "rank 0 (host0) is late by 0.100 s per step (10%): in 5 steps it was busy longer and waited less than the median of "
        "11 ranks with the same work, above all in phase 'data' (0.100 s)"
    ]
    assert not said(slow)
    assert not said(slow | {DATA: 0.15})
    assert "is late by 0.210 s" in said(slow | {DATA: 0.21})[0]
    assert said(slow, slow | {DATA: 0.2})[0].endswith("above all in phase 'data' (0.200 s); also late: rank 0 (host0)")
    assert said() == ["ranks 1 (host1), 0 (host0) are no longer late"]
    assert not said()
    assert not StragglerReport(Grid(GridShape(data=2)), 100, 0.05).judge([])  # type: ignore[arg-type]


def test_the_first_rank_alone_speaks_in_lines_of_some_length(caplog: pytest.LogCaptureFixture) -> None:
    fast, slow = {COMPUTE: 0.2}, {COMPUTE: 0.9}
    for pipe, times in ((1, ranks(*([fast] * 30), *([slow] * 20))), (8, ranks(*([fast] * 7), slow))):
        for rank in (1, 0):
            caplog.clear()
            grid = Grid(GridShape(pipe=pipe, data=len(times) // pipe), rank)
            StragglerReport(grid, 1, 0.05).judge([times[rank].numbers() for rank in sorted(times)])  # type: ignore[arg-type]
            lines = [record.getMessage() for record in caplog.records]
            assert [len(line) < 480 for line in lines] == [True] * (rank == 0)
            assert not lines or ("and 11 more" in lines[0]) == (pipe == 1)
