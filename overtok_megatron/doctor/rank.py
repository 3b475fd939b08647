"""What one rank of an examination does, from the first word to the report, which the first rank returns."""

import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from overtok_megatron.config.counts import bytes_per_rank
from overtok_megatron.config.derived import ranks_per_batch
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.doctor import findings
from overtok_megatron.doctor.facts import HostFacts, host_facts
from overtok_megatron.doctor.findings import HELLO, Host
from overtok_megatron.doctor.links import End, Link, link_findings
from overtok_megatron.doctor.meeting import Address, Meeting
from overtok_megatron.doctor.prober import Prober
from overtok_megatron.doctor.probing import Job
from overtok_megatron.doctor.report import Report
from overtok_megatron.doctor.rounds import Pair, pair_rounds
from overtok_megatron.doctor.run_facts import RunFacts, checked_run, folder_failure, made, read_run
from overtok_megatron.environment import usable_devices
from overtok_megatron.errors import OvertokError
from overtok_megatron.launching.shared_folder import token_in
from overtok_megatron.parallel.devices import num_accelerators

FACTS_SECONDS = 120.0  # datasets are opened in it
FOLDER_SECONDS = 40.0
LINK_SECONDS = 30.0  # of a pair
ALL_REDUCE_SECONDS = 60.0
_LIBRARY_SHARE = 0.8  # of a measurement's limit, after which the library itself should give up and say why
_STARTING = 15.0  # seconds that a measuring process takes to start again, after it was killed


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands. host: what the report calls its host. machine: which machine it is, whatever its name."""

    rank: int
    world: int
    local_rank: int
    host: str
    machine: str
    address: Address


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be examined.

    config, overrides: of a run, None = none. run_ranks: whether the ranks are as many as the run's, which its configuration is
    then checked for. hosts: names and ranks that were started, where that is known. wait: seconds for all ranks to come up.
    most_rounds: of pairs, of each kind and library.
    """

    config: str | None
    overrides: list[str]
    run_ranks: bool
    hosts: list[Host]
    wait: float
    most_rounds: int


def group_hosts(places: Mapping[int, tuple[str, str]], started: Sequence[Host]) -> list[Host]:
    """The hosts of ranks that said (name, machine), in the order of their first ranks; names of `started` hosts come first.

    Several machines of one name, say `localhost`, are told apart by their first ranks.
    """
    known = {rank: host.name for host in started for rank in host.ranks}
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, (name, machine) in sorted(places.items()):
        groups.setdefault((known[rank], "") if rank in known else (name, machine), []).append(rank)
    names = [name for name, _ in groups]
    return [
        Host(name if names.count(name) == 1 else f"{name} (rank {ranks[0]})", ranks)
        for (name, _), ranks in groups.items()
    ]


def rank_names(hosts: Sequence[Host]) -> dict[int, End]:
    """What the report calls each rank: its host's name, and its number where the host has several."""
    return {
        rank: End(host.name, host.name if len(host.ranks) == 1 else f"{host.name} rank {rank}")
        for host in hosts
        for rank in host.ranks
    }


def backends_of(devices: Mapping[int, str | None], hosts: Sequence[Host]) -> list[str]:
    """gloo, which control messages always use, and NCCL before it where every rank has a device of its own.

    devices: each rank's, by an identity; None = the rank has none.
    """
    for host in hosts:
        own = [devices.get(rank) for rank in host.ranks]
        if None in own or len(set(own)) < len(own):
            return ["gloo"]
    return ["nccl", "gloo"]


class Examination:
    """The steps of one rank. All ranks take the same ones in the same order; the first rank gathers a report."""

    def __init__(self, request: Request, place: Place, environment: Mapping[str, str]) -> None:
        self._request = request
        self._place = place
        self._environment = environment
        self._report = Report(ranks=place.world)
        self._config: RunConfig | None = None
        self._hosts: list[Host] = []
        self._clock = time.monotonic()

    def run(self) -> Report | None:
        """Take all steps; returns the report on the first rank.

        Raises ConfigError on the first rank where the configuration is wrong, MeetingLostError where this rank is alone.
        """
        request, place = self._request, self._place
        if place.rank == 0 and request.config is not None:
            checked_run(request.config, request.overrides, place.world if request.run_ranks else None)
        prober = Prober(place.address, place.local_rank)
        try:
            store = place.address.open(first=place.rank == 0, seconds=request.wait)
            meeting = Meeting(store, place.rank, place.world)
            self._meet(meeting)
            backends = self._tell_facts(meeting)
            if request.config is not None:
                self._share_folder(meeting)
            self._compare_clocks(meeting)
            for backend in backends:
                self._measure_links(meeting, prober, backend)
            for backend in backends:
                self._measure_all_reduce(meeting, prober, backend)
            meeting.step("the end", None, request.wait, lambda _: None)
            if place.rank == 0:
                self._conclude(meeting, backends)
                meeting.farewell()
                return self._report
            meeting.farewell()
            return None
        finally:
            prober.stop()

    @property
    def _leads(self) -> bool:
        """Whether this rank speaks for its host."""
        return any(host.ranks[0] == self._place.rank for host in self._hosts)

    def _lap(self, part: str) -> None:
        now = time.monotonic()
        self._report.seconds[part] = now - self._clock
        self._clock = now

    def _meet(self, meeting: Meeting) -> None:
        place = self._place

        def grouped(said: dict[int, Any]) -> list[list[Any]]:
            hosts = group_hosts({rank: (one[0], one[1]) for rank, one in said.items()}, self._request.hosts)
            return [[host.name, host.ranks] for host in hosts]

        told = meeting.step(HELLO, [place.host, place.machine], self._request.wait, grouped)
        self._hosts = [Host(name, ranks) for name, ranks in told]
        self._report.hosts = self._hosts
        self._lap("meeting")

    def _tell_facts(self, meeting: Meeting) -> list[str]:
        """Gather facts of hosts and of the run; returns the libraries over which links are measured."""
        request, place = self._request, self._place
        value: dict[str, Any] = {}
        failures: list[str] = []
        if self._leads:
            run: RunFacts | None = None
            if request.config is not None:
                self._config, run = read_run(
                    request.config, request.overrides, place.world if request.run_ranks else None
                )
            folder = self._config.training.output_directory if self._config is not None else "."
            value["facts"] = host_facts(self._environment, Path(folder)).as_json()
            value["run"] = None if run is None else run.as_json()
        try:
            value["device"] = self._device()
        except OvertokError as error:
            value["device"] = None
            failures += error.lines
        value["failures"] = failures

        def taken(said: dict[int, Any]) -> list[str]:
            for host in self._hosts:
                one = said.get(host.ranks[0])
                if one is None:
                    continue
                self._report.facts[host.name] = HostFacts.from_json(one["facts"])
                if one["run"] is not None:
                    self._report.runs[host.name] = RunFacts(**one["run"])
                self._report.findings += [f"host {host.name}: {line}" for line in one["failures"]]
            return backends_of({rank: one["device"] for rank, one in said.items()}, self._hosts)

        backends = meeting.step("its facts", value, FACTS_SECONDS, taken)
        self._lap("facts")
        return backends

    def _device(self) -> str | None:
        """The identity of the CUDA device that a rank of a run would take here; None where it takes the CPU, or has none."""
        count = usable_devices(self._environment, num_accelerators())
        index = self._place.local_rank if count > 1 else 0
        return str(torch.cuda.get_device_properties(index).uuid) if index < count else None

    def _share_folder(self, meeting: Meeting) -> None:
        """Find out whether all hosts share the output folder: the first one writes a file there, all read it."""
        folder = None if self._config is None else Path(self._config.training.output_directory)
        if self._place.rank != 0:
            token = meeting.step("the output folder", None, FOLDER_SECONDS, lambda _: "")
            failure = folder_failure(folder, token, str(self._place.rank)) if self._leads and folder and token else None
            meeting.step("the output folder", failure, FOLDER_SECONDS, lambda _: None)
            return
        assert folder is not None
        name = f"training.output_directory: {folder}"
        try:
            with made(folder), token_in(folder) as token:
                meeting.step("the output folder", None, FOLDER_SECONDS, lambda _: token)
                said: dict[int, str | None] = {}
                meeting.step("the output folder", None, FOLDER_SECONDS, said.update)
                wrong = {host.name: text for host in self._hosts if (text := said.get(host.ranks[0]))}
                self._report.findings += [f"host {host}: {name}: {text}" for host, text in wrong.items()]
                if not wrong:
                    self._report.folder = f"{name}: written by the first host, read and written by all"
        except OSError as error:
            self._report.findings.append(f"host {self._hosts[0].name}: {name}: cannot be written ({error.strerror})")
            for _ in range(2):
                meeting.step("the output folder", None, FOLDER_SECONDS, lambda _: "")
        self._lap("output folder")

    def _compare_clocks(self, meeting: Meeting) -> None:
        leaders = [host.ranks[0] for host in self._hosts if host.ranks[0] in meeting.members]
        clocks = meeting.clocks(leaders)
        self._report.clocks = {host.name: clocks[host.ranks[0]] for host in self._hosts if host.ranks[0] in clocks}
        self._lap("clocks")

    def _measure_links(self, meeting: Meeting, prober: Prober, backend: str) -> None:
        """Round after round, every pair of a round at once; a pair with a rank that is silent is not measured."""
        members = set(meeting.members)
        hosts = [own for host in self._hosts if (own := [rank for rank in host.ranks if rank in members])]
        rounds = pair_rounds(hosts, self._request.most_rounds)
        self._say(
            f"links over {backend}: rounds of pairs: {len(rounds)}, a few seconds each, {LINK_SECONDS + _STARTING:.0f} at most"
        )
        ends = rank_names(self._hosts)
        for turn, planned in enumerate(rounds):
            pairs = [pair for pair in planned if set(pair) <= set(meeting.members)]
            mine = next((pair for pair in pairs if self._place.rank in pair), None)
            answer = None if mine is None else self._probe_pair(prober, backend, turn, mine)
            said: dict[int, Any] = {}
            limit = LINK_SECONDS + _STARTING
            meeting.step(f"links over {backend}", answer, limit, said.update)
            if self._place.rank == 0:
                self._report.links += [joined(backend, pair, said, ends) for pair in pairs]
        self._lap(f"links over {backend}")

    def _probe_pair(self, prober: Prober, backend: str, turn: int, pair: Pair) -> dict[str, Any]:
        job = Job(
            kind="link",
            key=f"{backend}/{turn}/{pair[0]}-{pair[1]}",
            backend=backend,
            place=pair.index(self._place.rank),
            ranks=2,
            seconds=LINK_SECONDS * _LIBRARY_SHARE,
        )
        return prober.run(job, LINK_SECONDS)

    def _measure_all_reduce(self, meeting: Meeting, prober: Prober, backend: str) -> None:
        """Over all ranks that answer, unless a link is broken: the library connects every two of them, and would only wait."""
        names = rank_names(self._hosts)
        ends = {names[rank] for rank in meeting.members}
        failures = [
            link.failure for link in self._report.links if link.backend == backend and {link.first, link.second} <= ends
        ]
        broken = meeting.step("the links", None, LINK_SECONDS, lambda _: any(failures))
        ranks, answer = meeting.members, None
        if not broken and len(ranks) > 1:
            job = Job(
                kind="all",
                key=f"{backend}/all",
                backend=backend,
                place=ranks.index(self._place.rank),
                ranks=len(ranks),
                seconds=ALL_REDUCE_SECONDS * _LIBRARY_SHARE,
            )
            answer = prober.run(job, ALL_REDUCE_SECONDS)
        said: dict[int, Any] = {}
        meeting.step(f"an all-reduce over {backend}", answer, ALL_REDUCE_SECONDS + _STARTING, said.update)
        if self._place.rank == 0 and answer is not None:
            failed = [one for one in said.values() if "failure" in one]
            self._report.all_reduces[backend] = failed[0] if failed else answer
            if failed:
                self._report.findings.append(f"all-reduce over {backend}: {failed[0]['failure']}")
        elif self._place.rank == 0:
            self._report.notes.append(
                f"all-reduce over {backend}: not tried, {'a link is broken' if broken else 'one rank'}"
            )
        self._lap(f"all-reduce over {backend}")

    def _conclude(self, meeting: Meeting, backends: Sequence[str]) -> None:
        report, several = self._report, len(self._hosts) > 1
        started = [host for host in self._request.hosts if host.name not in {one.name for one in self._hosts}]
        report.findings[:0] = findings.silent_findings(meeting.silent, [*self._hosts, *started])
        report.findings += findings.host_differences(report.facts)
        remote = several and not self._place.address.loopback
        report.findings += findings.host_limits(
            report.facts, ranks=self._place.world, several=remote, nccl="nccl" in backends
        )
        report.findings += findings.run_differences(report.runs)
        if self._config is not None:
            report.findings += findings.disk_findings(report.facts, checkpoint_bytes(self._config))
        report.findings += findings.clock_findings(report.clocks)
        report.findings += link_findings(report.links)

    def _say(self, text: str) -> None:
        if self._place.rank == 0:
            print(f"doctor: {text}", file=sys.stderr, flush=True)


def joined(backend: str, pair: Pair, said: Mapping[int, Any], ends: Mapping[int, End]) -> Link:
    """The link of a pair by what its two ranks said; a rank that said nothing makes it a broken one."""
    first, second = (said.get(rank, {}) for rank in pair)
    silent = [f"{ends[rank].rank} is silent" for rank in pair if rank not in said]
    failures = [*silent, *(str(one["failure"]) for one in (first, second) if "failure" in one)]
    if failures:
        return Link(backend=backend, first=ends[pair[0]], second=ends[pair[1]], failure=failures[0])
    return Link(
        backend=backend,
        first=ends[pair[0]],
        second=ends[pair[1]],
        latency=first["latency"],
        rates=(first["rate"], second["rate"]),
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """About how many bytes a checkpoint has: weights, optimizer and tables of one copy of the model."""
    ranks = ranks_per_batch(config)
    own = bytes_per_rank(config, ranks)
    return ranks * (own.total - own.gradients)


def machine_identity() -> tuple[str, str]:
    """(name of this host, identity of the machine): containers and network namespaces of one machine share the second."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        machine = ""
    return socket.gethostname(), machine
