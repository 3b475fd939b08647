"""`overtok doctor`."""

import argparse
from pathlib import Path
from typing import Any

from overtok_megatron.commands.arguments import port, positive


def _doctor(options: argparse.Namespace) -> int:
    from overtok_megatron.doctor.starting import Options, examine

    return examine(
        Options(
            config=options.config,
            overrides=options.overrides,
            processes=options.ranks_per_host,
            hostfile=options.hostfile,
            json=options.json,
            master_port=options.master_port,
            wait=options.wait,
            rounds=options.rounds,
            host_name=options.host_name,
            started=options.started,
        )
    )


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser(
        "doctor",
        help="examine hosts before a run: versions, devices, limits, clocks, the run's files, and the links between them",
        description="Examine this host, or the hosts of the ranks that srun, torchrun or mpirun has started. Exit code: 0 all "
        "right, 1 a finding, 2 wrong arguments.",
    )
    verb.add_argument(
        "config", nargs="?", default=None, help="YAML file of a run that all hosts should read (default: none)"
    )
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    verb.add_argument(
        "--processes",
        type=positive,
        default=None,
        dest="ranks_per_host",
        help="ranks per host, as many as the run's, for which CONFIG is then checked (default: 1; 2 on this host alone)",
    )
    verb.add_argument(
        "--hostfile",
        type=Path,
        default=None,
        help="examine the hosts of this file, lines HOST slots=N, over ssh; --processes is then per host (default: 1)",
    )
    verb.add_argument("--json", default=None, help="file that gets everything that was found out; - prints it instead")
    verb.add_argument(
        "--master-port",
        type=port,
        default=None,
        help="port of the first rank, with ranks that this verb starts (default: a free one)",
    )
    verb.add_argument("--wait", type=positive, default=60, help="seconds in which all ranks must come up (default: 60)")
    verb.add_argument(
        "--rounds",
        type=positive,
        default=16,
        help="how many others each host measures its link to, at most (default: 16)",
    )
    verb.add_argument("--host-name", default=None, help="what the report calls this host (default: its own name)")
    verb.add_argument("--started", default="", help=argparse.SUPPRESS)  # which hosts a hostfile's ranks were started on
    verb.set_defaults(work=_doctor)
