"""Who takes part in an examination: this process, where a launcher has started it as a rank; else ranks started here."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overtok_megatron.doctor.prober import prepare_probers
from overtok_megatron.environment import ACCELERATOR, rank_environment, restore_visible_devices
from overtok_megatron.errors import OutputError
from overtok_megatron.files import write_atomically
from overtok_megatron.launching.batch_systems import Placement, find_placement
from overtok_megatron.launching.console import overtok_command
from overtok_megatron.launching.local import free_port

HERE = 2  # ranks that are started on this host where nothing else is asked for
_LEAVING = 15.0  # seconds that the other ranks have to leave after the first one


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line. processes: None = not given. host_name: None = the host's own."""

    config: str | None
    overrides: Sequence[str]
    processes: int | None
    json: Path | None
    wait: float
    rounds: int
    host_name: str | None

    def arguments(self) -> list[str]:
        """The same command line for a rank."""
        words = ["doctor", *([] if self.config is None else [self.config, *self.overrides])]
        named = {
            "--processes": self.processes,
            "--json": self.json,
            "--host-name": self.host_name,
            "--wait": self.wait,
            "--rounds": self.rounds,
        }
        return [*words, *(part for name, value in named.items() if value is not None for part in (name, str(value)))]


def examine(options: Options) -> int:
    """Examine the hosts of the ranks that a launcher has started, else this host alone; returns the exit code.

    0 = all right, 1 = a finding, or this rank was left alone. Raises ConfigError where the configuration is wrong.
    """
    placement = find_placement(os.environ)
    if "RANK" in os.environ or placement.world_size > 1:
        return _take_part(options, placement)
    if options.config is not None:
        from overtok_megatron.doctor.run_facts import load_run  # late: it imports the data room

        load_run(options.config, options.overrides, options.processes)
    return _start_here(options)


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
        hosts=[],
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
    print(report.text(), flush=True)
    if options.json is not None:
        _write_json(options.json, report.as_json())
    return 1 if report.findings else 0


def _write_json(path: Path, content: object) -> None:
    try:
        write_atomically(path, json.dumps(content, indent=2) + "\n", durable=False)
    except OSError as error:
        raise OutputError(f"--json: {path}: cannot be written ({error.strerror})") from None


def _start_here(options: Options) -> int:
    """Examine this host alone; returns the first rank's exit code."""
    processes = options.processes or HERE
    environment = rank_environment(os.environ, processes, deterministic=False, cuda=True)
    if ACCELERATOR not in os.environ:
        del environment[ACCELERATOR]  # a rank takes the devices that it finds
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    ranks = [
        subprocess.Popen(
            overtok_command(*options.arguments()), env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(processes)
    ]
    try:
        code = ranks[0].wait()
        for rank in ranks[1:]:
            try:
                rank.wait(_LEAVING)
            except subprocess.TimeoutExpired:
                continue
        return code
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
