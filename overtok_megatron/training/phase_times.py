"""How long a rank is busy in each phase of its steps, and how long it waits for others: the report on stragglers compares this.

Every moment counts once, in the innermost phase: as waiting where the rank is in a collective (parallel/spans.py), or waits for
one of its own threads that is in one; else as busy.

On the CPU this is time of the host, of every step. On a GPU the host runs ahead of the device, and its time says little: there
CUDA events are recorded on the stream that computes, at the borders of phases and around collectives, in the last `SAMPLED`
steps before a report, because a step may have thousands of collectives. The time between two events is the device's, its idle
time included, so that a host that is too slow to keep its device at work is seen as well. Events are read when a later step has
been waited for; the host never waits for them. Not seen as waiting there: collectives on other streams, as DeepSpeed's
reduction of gradients under ZeRO 2 and 3, which count as busy on all ranks alike.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from overtok_megatron.parallel.spans import observe, seconds_waited, seconds_waited_for_threads

DATA, EXCHANGE, COMPUTE = "data", "row exchange", "forward and backward"
UPDATE, ROW_UPDATE, SAVE, REST = "update of weights", "update of rows", "save", "rest of the step"
PHASES = (DATA, EXCHANGE, COMPUTE, UPDATE, ROW_UPDATE, SAVE, REST)
SAMPLED = 10  # steps before a report that are timed on a GPU
Phase = str | None  # None: what is not compared, as evaluations


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Mean seconds per step of one rank. steps: how many were measured. busy: by phase. waited: in collectives."""

    steps: int
    waited: float
    busy: dict[str, float]

    @property
    def total_busy(self) -> float:
        return sum(self.busy.values())

    def numbers(self) -> list[float]:
        """As numbers, always as many, for a collective."""
        return [float(self.steps), self.waited, *(self.busy[phase] for phase in PHASES)]

    @classmethod
    def of_numbers(cls, values: "list[float] | tuple[float, ...]") -> "RankTimes":
        steps, waited, *busy = values
        return cls(steps=int(steps), waited=waited, busy=dict(zip(PHASES, busy, strict=True)))


class _Sums:
    """Seconds since the last `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.busy = dict.fromkeys(PHASES, 0.0)
        self.waited = dict.fromkeys(PHASES, 0.0)
        self.steps = 0

    def add(self, phase: Phase, seconds: float, waited: float) -> None:
        """Add a stretch of a phase, of which this rank has waited for so long."""
        if phase is not None:
            waited = min(seconds, waited)
            self.waited[phase] += waited
            self.busy[phase] += seconds - waited

    def add_step(self, step: "_Sums") -> None:
        """Add a step that has ended."""
        for phase in PHASES:
            self.busy[phase] += step.busy[phase]
            self.waited[phase] += step.waited[phase]
        self.steps += 1


class HostTimes:
    """Times of the thread that calls it, by the host's clock."""

    def __init__(self) -> None:
        self.sums = _Sums()  # of steps that have ended
        self._step = _Sums()
        self._phase: Phase = None
        self._since = self._waited = 0.0

    def end_step(self) -> None:
        """Count everything since the last call as one step."""
        self.sums.add_step(self._step)
        self._step.clear()

    def switch(self, phase: Phase) -> None:
        """End the phase that goes on, and begin another."""
        now = time.monotonic()
        waited = seconds_waited(now)
        self._step.add(self._phase, now - self._since, waited - self._waited)
        self._phase, self._since, self._waited = phase, now, waited


@dataclass(kw_only=True)
class _Segment:
    """A stretch of one phase on the device. spans: events at both ends of collectives within. for_threads: of the host."""

    phase: Phase
    begin: Any
    end: Any = None
    spans: list[list[Any]] = field(default_factory=list)
    for_threads: float = 0.0


class DeviceTimes:
    """Times of a GPU's stream. record: records an event on the stream that computes, or None where another one is current."""

    def __init__(self, record: Callable[[], Any | None]) -> None:
        self.sums = _Sums()
        self._record = record
        self._steps: deque[list[_Segment]] = deque()  # have ended on the host, perhaps not on the device
        self._now: list[_Segment] | None = None  # of the step that goes on; None while no step is timed
        self._for_threads = 0.0

    def begin_step(self, timed: bool, phase: Phase) -> None:
        """End the step that goes on, if it is timed, and begin another, in a phase."""
        if self._now is not None and (event := self._record()) is not None:
            self._close(event)
            self._steps.append(self._now)
        self._now = None
        self._read()
        observe(self if timed else None)
        if timed:
            self._now = []
            self._open(phase, self._record())

    def switch(self, phase: Phase) -> None:
        """End the phase that goes on, and begin another."""
        if self._now is not None:
            event = self._record()
            self._close(event)
            self._open(phase, event)

    def begins(self) -> None:
        """A collective begins."""
        if self._now and (event := self._record()) is not None:
            self._now[-1].spans.append([event])

    def ends(self) -> None:
        """The collective that began last ends."""
        if self._now and self._now[-1].spans and len(self._now[-1].spans[-1]) == 1:
            self._now[-1].spans[-1].append(self._record())

    def take(self) -> None:
        """Bring `sums` up to date, and leave out steps that the device has not finished."""
        self._read()
        self._steps.clear()

    def _open(self, phase: Phase, event: Any) -> None:
        assert self._now is not None
        self._for_threads = seconds_waited_for_threads()
        self._now.append(_Segment(phase=phase, begin=event))

    def _close(self, event: Any) -> None:
        assert self._now is not None
        self._now[-1].end = event
        self._now[-1].for_threads = seconds_waited_for_threads() - self._for_threads

    def _read(self) -> None:
        """Add up the steps whose last event the device has passed."""
        while self._steps and self._steps[0][-1].end.query():
            for segment in self._steps.popleft():
                waited = sum(_seconds(*ends) for ends in segment.spans if len(ends) == 2)
                self.sums.add(segment.phase, _seconds(segment.begin, segment.end), waited + segment.for_threads)
            self.sums.steps += 1


def _seconds(begin: Any, end: Any) -> float:
    """Seconds of the device between two events; 0 where one was not recorded."""
    return 0.0 if begin is None or end is None else float(begin.elapsed_time(end)) / 1000


def _recorder(device: torch.device) -> Callable[[], Any | None]:
    """Records events on the current stream of the thread that makes it, from any thread whose current stream that is."""
    compute = torch.cuda.current_stream(device)

    def record() -> Any | None:
        stream = torch.cuda.current_stream(device)
        return stream.record_event(torch.cuda.Event(enable_timing=True)) if stream == compute else None

    return record


class PhaseTimes:
    """The times of one rank.

    Order of calls: `begin_step` before each step but the first one, which compiles kernels; `phase`, or `enter` and `leave`,
    within steps; `take` in a step that reports. interval: of steps between reports; None = nothing is measured.
    """

    def __init__(self, device: torch.device, interval: int | None) -> None:
        self.interval = interval
        self._running = False
        self._phases: list[Phase] = [REST]
        self._host = HostTimes()
        self._device = DeviceTimes(_recorder(device)) if interval is not None and device.type == "cuda" else None

    def due(self, step: int) -> bool:
        """Whether the times are reported in optimizer step `step`: those of the steps before it."""
        return self.interval is not None and step % self.interval == 0

    def begin_step(self, step: int) -> None:
        """Optimizer step `step` begins, and all that came since the last call belongs to the step before it."""
        if self.interval is None:
            return
        self._host.switch(REST)
        if self._running:
            self._host.end_step()
        self._running = True
        if self._device is not None:
            self._device.begin_step(step % self.interval >= self.interval - SAMPLED, REST)

    def enter(self, phase: Phase) -> None:
        """Begin a phase within the one that goes on."""
        self._phases.append(phase)
        self._switch()

    def leave(self) -> None:
        """Go back to the phase in which the present one began."""
        self._phases.pop()
        self._switch()

    def phase(self, name: Phase) -> "_InPhase":
        """A context in which a phase goes on."""
        return _InPhase(self, name)

    def take(self) -> RankTimes:
        """The means since the last call, over the steps that have ended. Saves are timed by the host's clock, all of them."""
        steps = max(1, self._host.sums.steps)
        sums = self._host.sums
        saving, saving_waited = sums.busy[SAVE] / steps, sums.waited[SAVE] / steps
        if self._device is not None:
            self._device.take()
            sums = self._device.sums
        count = max(1, sums.steps)
        busy = {phase: seconds / count for phase, seconds in sums.busy.items()} | {SAVE: saving}
        waited = sum(seconds for phase, seconds in sums.waited.items() if phase != SAVE) / count + saving_waited
        found = RankTimes(steps=sums.steps, waited=waited, busy=busy)
        self._host.sums.clear()
        if self._device is not None:
            self._device.sums.clear()
        return found

    def stop(self) -> None:
        """Measure nothing from now on."""
        self._running = False
        observe(None)

    def _switch(self) -> None:
        if self._running:
            self._host.switch(self._phases[-1])
            if self._device is not None:
                self._device.switch(self._phases[-1])


class _InPhase:
    def __init__(self, times: PhaseTimes, name: Phase) -> None:
        self._times = times
        self._name = name

    def __enter__(self) -> None:
        self._times.enter(self._name)

    def __exit__(self, *error: object) -> None:
        self._times.leave()
