"""The watch over all ranks of a job, on the first host: which one died or hangs, what is said, and that the job ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from overtok_megatron.watching.clock import RunningClock
from overtok_megatron.watching.hang_report import culprits, innermost, write_report
from overtok_megatron.watching.links import LOST_AFTER, Message

# The phases of a run, and how many times training.hang_timeout each may take. A start reads a checkpoint, and a save
# writes and hashes one. The first step compiles kernels, and so does the first batch of an evaluation; each batch counts anew.
PHASES = {"start": 12, "first step": 4, "step": 1, "evaluate": 4, "save": 12, "end": 12}
ASKED_TO_LEAVE = (0, 75, 143)  # exit codes of ranks that all leave together
_COMING = 120.0  # seconds that a rank has to reach its host's watchdog after all ranks have agreed to begin
_ANSWERING = 5.0  # seconds in which a rank answers with its stacks
_MOST_LINES = 4

Rank = dict[str, Any]


class JobWatch:
    """Judges the reports of all hosts; `tick` must be called once per second.

    expected: how many ranks the job has. hang_timeout: seconds that a step may take; None = any time. command: called with
    what every host has to do. say: prints a line.
    """

    def __init__(
        self,
        *,
        expected: int,
        hang_timeout: float | None,
        folder: Path,
        clock: RunningClock,
        command: Callable[[Message], None],
        say: Callable[[str], None],
    ) -> None:
        self._expected = expected
        self._hang_timeout = hang_timeout
        self._folder = folder
        self._clock = clock
        self._command = command
        self._say = say
        self._started = clock.now()
        self._come_by = self._started + self._limit("start")  # by then each rank must have been reported
        self.ranks: dict[int, Rank] = {}
        self._heard: dict[str, float] = {}  # when each watchdog reported last
        self._disconnected: set[str] = set()
        self._texts: dict[int, str] = {}
        self._asked: float | None = None  # when the ranks were asked for their stacks
        self._ended: str | None = None  # how the job ended, in a word that names a file

    @property
    def all_gone(self) -> bool:
        """Whether no rank that was ever reported has a process any more, and, unless the job was ended, all were reported."""
        reported = len(self.ranks) == self._expected or self._ended is not None
        return reported and not any(rank["process"] for rank in self.ranks.values())

    def receive(self, watchdog: str, host: str, ranks: list[Rank]) -> None:
        """Take a report on the ranks of a host. watchdog: names it alone, for several hosts may have one name."""
        now = self._clock.now()
        self._heard[watchdog] = now
        self._disconnected.discard(watchdog)
        for rank in ranks:
            self.ranks[rank["rank"]] = rank | {"host": host, "watchdog": watchdog, "at": now}
        for rank in sorted(ranks, key=lambda rank: int(rank["rank"])):
            if self._ended is None:
                self._judge_dead(self.ranks[rank["rank"]])

    def receive_text(self, rank: int, text: str) -> None:
        """Take a rank's stacks or traceback."""
        self._texts[rank] = text

    def all_come(self) -> None:
        """Take the first rank's word that every rank has agreed to begin: a rank that is not reported soon has died."""
        self._come_by = min(self._come_by, self._clock.now() + _COMING)

    def disconnected(self, watchdog: str) -> None:
        """Note that a watchdog's connection has ended. It may come back within `LOST_AFTER` seconds."""
        self._disconnected.add(watchdog)

    def rank_failed(self) -> None:
        """Take a rank's word that it has an error: where a host is disconnected, that host's end is the cause."""
        for watchdog in self._disconnected:
            if self._ended is None and self._living(watchdog):
                self._lose(watchdog)

    def tick(self) -> None:
        """Judge what time alone brings about: silence, and hangs."""
        if self._ended is not None:
            return None
        now = self._clock.now()
        for watchdog, heard in self._heard.items():
            if now - heard > LOST_AFTER and self._living(watchdog):
                return self._lose(watchdog)
        if self._asked is not None:
            living = {number for number, rank in self.ranks.items() if rank["state"] == "alive"}
            if living <= self._texts.keys() or now - self._asked > _ANSWERING:
                self._report_hang()
        elif any(self._over_limit(rank) for rank in self.ranks.values()) or self._never_came():
            self._asked = now
            self._command({"type": "stacks"})
        return None

    def finish(self) -> None:
        """Say that the ended job has gone, when its ranks have, where it was said that they will."""
        if self._ended is None or (self._ended == "mistake" and self.all_gone):
            return
        where = ""
        if self._ended != "hang" and self._texts:
            path = write_report(self._folder, self._ended, self._described(), self._texts)
            where = f"; what the other ranks raised is in {path}" if path else ""
        if self.all_gone:
            self._say(f"all ranks have gone{where}")
        else:
            left = [str(number) for number, rank in self.ranks.items() if rank["process"]]
            self._say(f"it is not known whether ranks {', '.join(left)} have gone{where}")

    def _living(self, watchdog: str) -> list[Rank]:
        """The ranks of a host that had a process when it was heard last."""
        return [rank for rank in self.ranks.values() if rank["watchdog"] == watchdog and rank["process"]]

    def _lose(self, watchdog: str) -> None:
        own = self._living(watchdog)
        names = ", ".join(str(rank["rank"]) for rank in own)
        what = f"has not been heard for {self._clock.now() - self._heard[watchdog]:.0f} s"
        if watchdog in self._disconnected:
            what = "is lost: its watchdog's connection has ended"
        self._end(
            1,
            f"host {own[0]['host']} (ranks {names}) {what}; rank {own[0]['rank']} was last heard {self._doing(own[0])}",
        )

    def _judge_dead(self, rank: Rank) -> None:
        """End the job where a rank has died, or has left with a code that says that it failed."""
        if rank["state"] == "died":
            self._end(1, f"{_name(rank)} {rank['how']}, last heard {self._doing(rank)}")
        elif rank["state"] == "left" and rank["code"] in ASKED_TO_LEAVE:
            return
        elif rank["state"] == "left" and rank["said"]:
            self._end(rank["code"], None)
        elif rank["state"] == "left":
            why = f" ({rank['why']})" if rank["why"] else ""
            self._end(1, f"{_name(rank)} left with exit code {rank['code']}{why}, {self._doing(rank)}")

    def _end(self, code: int, line: str | None) -> None:
        """End all ranks. code: theirs; line: what happened; None where a rank has said it."""
        self._ended = "death" if line is not None else "mistake"
        if line is not None:
            self._say(f"{line}; ending all ranks of the job")
        self._command({"type": "leave", "code": code})

    def _limit(self, phase: str) -> float:
        return (self._hang_timeout or float("inf")) * PHASES[phase]

    def _seconds(self, rank: Rank) -> float:
        """How long a rank has been in its phase."""
        return float(rank["beat"]["seconds"] + rank["age"] + self._clock.now() - rank["at"])

    def _over_limit(self, rank: Rank) -> bool:
        return rank["state"] == "alive" and self._seconds(rank) > self._limit(rank["beat"]["phase"])

    def _never_came(self) -> list[int]:
        if self._clock.now() < self._come_by:
            return []
        return sorted(set(range(self._expected)) - self.ranks.keys())

    def _doing(self, rank: Rank) -> str:
        beat = rank["beat"]
        step = "" if beat["step"] is None else f"at step {beat['step']}, "
        found = f"{step}in phase {beat['phase']!r} for {self._seconds(rank):.1f} s"
        waited = self._seconds(rank) - beat["seconds"]
        return found + "".join(f", in {name} for {seconds + waited:.1f} s" for name, seconds in beat["collectives"])

    def _described(self) -> dict[int, str]:
        """What is known of every rank, in a line."""
        lines = {number: f"{_name(rank)}, {self._doing(rank)}" for number, rank in sorted(self.ranks.items())}
        return lines | {number: f"rank {number} has never been heard" for number in self._never_came()}

    def _report_hang(self) -> None:
        self._ended = "hang"
        absent = self._never_came()
        living = {number: rank for number, rank in self.ranks.items() if rank["state"] == "alive"}
        silent = {
            number: f"does not answer ({rank['process']})"
            for number, rank in living.items()
            if number not in self._texts
        }
        path = write_report(self._folder, "hang", self._described(), self._texts | silent)
        named = [] if absent else culprits({number: rank["beat"] for number, rank in living.items()}, self._texts)
        for number in absent[:_MOST_LINES]:
            self._say(
                f"rank {number} has not reached its watchdog within {self._come_by - self._started:.0f} s of the start"
            )
        for number in named[:_MOST_LINES]:
            rank = living[number]
            limit = self._limit(rank["beat"]["phase"])
            what = silent.get(number) or f"is in {innermost(self._texts[number])}"
            heard = "last heard " if number in silent else ""
            self._say(f"{_name(rank)} hangs, {heard}{self._doing(rank)} ({limit:g} s are allowed): it {what}")
        further = len(absent) + len(named) - min(len(absent), _MOST_LINES) - min(len(named), _MOST_LINES)
        more = f" and of {further} more ranks that hang" if further else ""
        self._say(
            f"stacks of {len(self._texts)} of {self._expected} ranks{more} are in {path}; ending all ranks of the job"
        )
        self._command({"type": "leave", "code": 1})


def _name(rank: Rank) -> str:
    return f"rank {rank['rank']} on {rank['host']} (process {rank['pid']})"
