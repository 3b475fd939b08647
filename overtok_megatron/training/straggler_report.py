"""Which rank is late, by how much and in which phase: what the first rank says of the times that all ranks have measured.

All ranks end a step together, because collectives join them. A late rank is busy longer than the others and waits less, because
the others wait for it. Its lateness is the smaller of two numbers, both in seconds per step: how much longer it is busy than
the median of the ranks that it is compared with, and how much less it waits than their median. Ranks with the same work are
compared: those of one pipeline stage. Where every stage has one rank, the stages are compared with each other, and a stage that
has more work than the others is found as well.

A slow link makes the ranks at both its ends wait, and none of them is late: the watchdogs measure how long messages between
hosts travel (watching/link_times.py), and `overtok doctor` measures each pair of hosts.
"""

import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from overtok_megatron.parallel.grid import GridShape, ProcessGrid
from overtok_megatron.training.phase_times import PHASES, RankTimes

log = logging.getLogger(__name__)

# Seconds per step below which nobody is late: small models have steps of milliseconds, which vary by as much.
_LEAST = 0.005
_MOST_NAMES = 8
_CHANGES = 2.0  # a line is printed again where the lateness has grown or shrunk by this factor


@dataclass(frozen=True, kw_only=True)
class Late:
    """A rank that others wait for. seconds: per step. step_seconds: of a step of the ranks that it is compared with.

    phase: the one in which it is busy longest beyond their median, by `phase_seconds` per step. stage: its pipeline stage,
    where it is compared with other stages, else None. others: how many ranks it is compared with.
    """

    rank: int
    seconds: float
    phase: str
    phase_seconds: float
    step_seconds: float
    others: int
    stage: int | None


def compared_groups(shape: GridShape) -> list[list[int]]:
    """The ranks that are compared with each other."""
    groups = shape.all_groups("data", "context", "tensor")
    return groups if len(groups[0]) > 1 else [list(range(shape.world_size))]


def late_ranks(times: Mapping[int, RankTimes], shape: GridShape, threshold: float) -> list[Late]:
    """The ranks that are late by more than `threshold` times a step, the latest one first. times: by rank."""
    found = []
    by_stage = shape.world_size == shape.pipe  # stages of one rank each, which are compared with each other
    for group in compared_groups(shape):
        measured = [rank for rank in group if rank in times and times[rank].steps > 0]
        for rank in measured if len(measured) > 1 else ():
            late = _lateness(rank, {one: times[one] for one in measured}, rank if by_stage else None)
            if late.seconds > max(_LEAST, threshold * late.step_seconds):
                found.append(late)
    return sorted(found, key=lambda late: -late.seconds)


def _lateness(rank: int, times: Mapping[int, RankTimes], stage: int | None) -> Late:
    own, others = times[rank], [times[other] for other in times if other != rank]
    busier = own.total_busy - median(other.total_busy for other in others)
    waits_less = median(other.waited for other in others) - own.waited
    beyond = {phase: own.busy[phase] - median(other.busy[phase] for other in others) for phase in PHASES}
    phase = max(beyond, key=lambda name: beyond[name])
    return Late(
        rank=rank,
        seconds=min(busier, waits_less),
        phase=phase,
        phase_seconds=beyond[phase],
        step_seconds=median(other.total_busy + other.waited for other in others),
        others=len(others),
        stage=stage,
    )


class StragglerReport:
    """Judges the times of all ranks, all of which must make one. It has something to say on the first rank alone.

    threshold: the share of a step by which a rank must be late to be named. interval: None = there are no reports.
    """

    def __init__(self, grid: ProcessGrid, interval: int | None, threshold: float) -> None:
        self._grid = grid
        self._threshold = threshold
        self._hosts = grid.gather_objects(socket.gethostname()) if interval is not None else []
        self._said: dict[int, Late] = {}

    def judge(self, gathered: Sequence[Sequence[float]]) -> dict[str, float]:
        """The metrics of a report, from the numbers of all ranks' times; on the first rank also a line where one is late."""
        times = {rank: RankTimes.of_numbers(tuple(numbers)) for rank, numbers in enumerate(gathered)}
        measured = [one for one in times.values() if one.steps > 0]
        if not measured:
            return {}
        late = late_ranks(times, self._grid.shape, self._threshold)
        if self._grid.rank == 0:
            for line in self._lines(late, max(one.steps for one in measured)):
                log.warning("%s", line)
        busy = [one.total_busy for one in measured]
        return {
            "stragglers/late_rank": float(late[0].rank) if late else -1.0,
            "stragglers/late_seconds": late[0].seconds if late else 0.0,
            "stragglers/busy_seconds_max": max(busy),
            "stragglers/busy_seconds_median": median(busy),
            "stragglers/waited_seconds_median": median(one.waited for one in measured),
        }

    def _lines(self, late: Sequence[Late], steps: int) -> list[str]:
        """What is new since the last report: that ranks are late, or that none is any more."""
        before, self._said = self._said, {one.rank: one for one in late}
        if not late:
            return (
                [f"{self._named(list(before))} {'are' if len(before) > 1 else 'is'} no longer late"] if before else []
            )
        if self._said.keys() == before.keys() and not any(_differs(one, before[one.rank]) for one in late):
            self._said = before  # what was said is what the next report is compared with
            return []
        return [self._line(late, steps)]

    def _line(self, late: Sequence[Late], steps: int) -> str:
        first, further = late[0], [one.rank for one in late[1:]]
        of_stage, among, hint = "", "with the same work", ""
        if first.stage is not None:
            of_stage = f", the only one of stage {first.stage + 1} of {self._grid.shape.pipe},"
            among = "in other stages"
            hint = "; a stage with more work is late, too: see parallel.pipeline_partition"
        others = f"{first.others} ranks" if first.others > 1 else "1 rank"
        more = f"; also late: {self._named(further)}" if further else ""
        return (
            f"{self._named([first.rank])}{of_stage} is late by {first.seconds:.3f} s per step "
            f"({100 * first.seconds / first.step_seconds:.0f}%): in {steps} steps it was busy longer and waited less than the "
            f"median of {others} {among}, above all in phase {first.phase!r} ({first.phase_seconds:.3f} s){hint}{more}"
        )

    def _named(self, ranks: Sequence[int]) -> str:
        names = [f"{rank} ({self._hosts[rank]})" for rank in ranks[:_MOST_NAMES]]
        more = f" and {len(ranks) - _MOST_NAMES} more" if len(ranks) > _MOST_NAMES else ""
        return f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(names)}{more}"


def _differs(now: Late, before: Late) -> bool:
    ratio = now.seconds / before.seconds
    return now.phase != before.phase or not 1 / _CHANGES < ratio < _CHANGES
