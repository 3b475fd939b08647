"""Who takes part in an examination: this process, where a launcher has started it as a rank; else ranks started here."""

import errno
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overtok_megatron.doctor.one_host import Ranks, start_ranks, wait_for_ranks
from overtok_megatron.doctor.prober import prepare_probers
from overtok_megatron.environment import restore_visible_devices
from overtok_megatron.errors import OutputError
from overtok_megatron.files import refuse_inputs, write_atomically
from overtok_megatron.launching.batch_systems import find_placement
from overtok_megatron.launching.cluster import Host, read_hostfile
from overtok_megatron.launching.local import free_port
from overtok_megatron.placement import Placement

if TYPE_CHECKING:
    from overtok_megatron.doctor.findings import Host as Examined
    from overtok_megatron.doctor.report import Report

HERE = 2  # ranks that are started on this host where nothing else is asked for
STANDARD_OUTPUT = "-"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line. processes: None = not given. host_name: None = the host's own. json: a file, or STANDARD_OUTPUT.

    started: of a rank, the hosts that were started, in the order of their ranks, as "a:8,b:8"; "" = not known.
    """

    config: str | None
    overrides: Sequence[str]
    processes: int | None
    hostfile: Path | None
    json: str | None
    master_port: int | None
    wait: float
    rounds: int
    host_name: str | None
    started: str

    def arguments(self) -> list[str]:
        """The same command line for a rank, without the hosts and where the report goes."""
        words = ["doctor", *([] if self.config is None else [self.config, *self.overrides])]
        named = {
            "--processes": self.processes,
            "--host-name": self.host_name,
            "--wait": self.wait,
            "--rounds": self.rounds,
        }
        return [*words, *(part for name, value in named.items() if value is not None for part in (name, str(value)))]


def examine(options: Options) -> int:
    """Examine the hosts of the ranks that a launcher has started, those of a file, or else this host alone.

    Returns the exit code: 0 = all right, 1 = a finding, or this rank was left alone. Raises ConfigError where the
    configuration, the hostfile or the launcher's variables are wrong, OutputError where the JSON file cannot be written.
    """
    if options.hostfile is None:
        placement = find_placement(os.environ)
        if placement.rank == 0:
            _check_json(options)
        if "RANK" in os.environ or placement.world_size > 1:
            return _take_part(options, placement)
        ranks = options.processes or HERE
    else:
        _check_json(options)
        hosts = _hosts_of(options.hostfile, options.processes)
        ranks = sum(host.ranks for host in hosts)
    if options.config is not None:
        from overtok_megatron.doctor.run_facts import checked_run  # late: it imports the data room

        checked_run(options.config, options.overrides, None if options.processes is None else ranks)
    if options.hostfile is None:
        return _start_here(options, ranks)

    from overtok_megatron.doctor.remote import examine_hosts

    return _publish(options, examine_hosts(hosts, options.arguments(), os.environ, options.master_port))


def _check_json(options: Options) -> None:
    """Raise OutputError where the JSON file cannot be written: before the examination, which takes minutes on many hosts."""
    if options.json in (None, STANDARD_OUTPUT):
        return
    path = Path(options.json)
    inputs = [] if options.config is None else [Path(options.config)]
    refuse_inputs([path], inputs + ([] if options.hostfile is None else [options.hostfile]), "--json")
    reason = ""
    if path.is_dir():
        reason = os.strerror(errno.EISDIR)
    elif not path.parent.is_dir():
        reason = os.strerror(errno.ENOENT)
    elif not os.access(path.parent, os.W_OK):
        reason = os.strerror(errno.EACCES)
    if reason:
        raise OutputError(f"--json: {path}: cannot be written ({reason}); name a file in an existing folder")


def _hosts_of(path: Path, processes: int | None) -> Sequence[Host]:
    """The hosts of a file, with one rank each unless `processes` are asked for. Raises ConfigError as `read_hostfile`."""
    if processes is not None:
        return read_hostfile(path, processes)
    return [Host(host.name, 1) for host in read_hostfile(path, None)]


def started_hosts(text: str) -> "list[Examined]":
    """The hosts of "a:8,b:8" with their ranks, numbered in that order."""
    from overtok_megatron.doctor.findings import Host as Examined

    hosts: list[Examined] = []
    for part in filter(None, text.split(",")):
        name, _, count = part.rpartition(":")
        first = sum(len(host.ranks) for host in hosts)
        hosts.append(Examined(name, list(range(first, first + int(count)))))
    return hosts


def _take_part(options: Options, placement: Placement) -> int:
    """Be a rank. The first one prints the report and writes the JSON file."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read when torch is imported; failures are in the report
    restore_visible_devices(os.environ)
    prepare_probers()
    from overtok_megatron.doctor.meeting import Address, MeetingLostError
    from overtok_megatron.doctor.rank import Examination, Place, Request, machine_identity

    name, machine = machine_identity()
    place = Place(
        rank=placement.rank,
        world=placement.world_size,
        local_rank=placement.local_rank,
        host=options.host_name or name,
        machine=machine,
        address=Address(
            host=placement.master_address,
            port=placement.master_port,
            served=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        ),
    )
    request = Request(
        config=options.config,
        overrides=list(options.overrides),
        run_ranks=options.processes is not None,
        hosts=started_hosts(options.started),
        wait=options.wait,
        most_rounds=options.rounds,
    )
    try:
        report = Examination(request, place, dict(os.environ)).run()
    except MeetingLostError as error:
        print(f"error: host {place.host}, rank {place.rank}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # a thread may wait in the store for ever
    if report is None:
        return 0
    return _publish(options, report)


def _publish(options: Options, report: "Report") -> int:
    """Print the report, or its JSON where that goes to standard output, and write the JSON file; returns the exit code."""
    if options.json == STANDARD_OUTPUT:
        print(json.dumps(report.as_json()), flush=True)
    else:
        print(report.text(), flush=True)
    if options.json not in (None, STANDARD_OUTPUT):
        path = Path(options.json)
        try:
            write_atomically(path, json.dumps(report.as_json(), indent=2) + "\n", durable=False)
        except OSError as error:
            raise OutputError(f"--json: {path}: cannot be written ({error.strerror})") from None
    return 1 if report.findings else 0


def _start_here(options: Options, processes: int) -> int:
    """Examine this host alone; returns the first rank's exit code."""
    arguments = options.arguments() + ([] if options.json is None else ["--json", options.json])
    ranks = Ranks(
        arguments=arguments,
        environment={},
        first=0,
        count=processes,
        world=processes,
        master_address="127.0.0.1",
        master_port=options.master_port or free_port(),
    )
    return wait_for_ranks(start_ranks(ranks, os.environ))
