"""`overtok config | train`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from overtok_megatron.commands.arguments import not_negative, port, positive
from overtok_megatron.errors import ConfigError, OutputError
from overtok_megatron.files import refuse_inputs


def _config(options: argparse.Namespace) -> int:
    from overtok_megatron.config.loading import save_resolved
    from overtok_megatron.config.validation import validate
    from overtok_megatron.launching.preparation import load_run
    from overtok_megatron.planning.config_report import describe

    loaded = load_run(options.config, options.overrides, _note)
    validate(loaded.config, options.processes, loaded.locate)
    if options.write is not None:
        refuse_inputs([options.write], [Path(options.config)], "--write")
        try:
            save_resolved(loaded.config, options.write, "--write")
        except OSError as error:
            raise OutputError(f"--write {options.write}: cannot be written ({error.strerror})") from None
    print(describe(loaded, options.processes))
    return 0


def _train(options: argparse.Namespace) -> int:
    from overtok_megatron.launching.cluster import Cluster, read_hostfile
    from overtok_megatron.launching.local import launch
    from overtok_megatron.launching.preparation import load_run

    cluster, processes = None, options.processes
    for flag, value in (("--launcher", options.launcher), ("--launcher-args", options.launcher_args)):
        if value is not None and options.hostfile is None:
            raise ConfigError(
                f"{flag}: {value}; has no effect without --hostfile, which names the hosts; give --hostfile as well"
            )
    if options.hostfile is not None:
        hosts = read_hostfile(options.hostfile, options.processes)
        cluster = Cluster(
            hosts=hosts, launcher=options.launcher or "pdsh", launcher_arguments=options.launcher_args or ""
        )
        processes = cluster.world_size
    loaded = load_run(options.config, options.overrides, _note)
    return launch(loaded, processes, options.master_port, cluster, max_restarts=options.max_restarts)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.add_argument("--processes", type=positive, default=None, help="ranks on this host (default: its GPUs, or 1)")


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser("config", help="print a configuration resolved, with what follows from it")
    _add_overrides(verb)
    verb.add_argument(
        "--world-size",
        type=positive,
        dest="processes",
        metavar="N",
        help="ranks of the run, on machines that need not be here; the same as --processes",
    )
    verb.add_argument("--write", type=Path, metavar="FILE", help="also store the resolved configuration in a file")
    verb.set_defaults(work=_config)

    verb = verbs.add_parser("train", help="train, on one or more ranks of this host, or of several")
    _add_overrides(verb)
    verb.add_argument("--master-port", type=port, default=None, help="port of the first rank (default: a free one)")
    verb.add_argument(
        "--hostfile",
        type=Path,
        default=None,
        help="train on the hosts of this file, lines HOST slots=N; --processes is then per host (default: the slots)",
    )
    verb.add_argument(
        "--launcher",
        choices=["pdsh", "openmpi", "mpich", "impi", "slurm"],
        default=None,
        help="with --hostfile: by what DeepSpeed starts the ranks (default: pdsh)",
    )
    verb.add_argument("--launcher-args", default=None, help="with --hostfile: words for pdsh, mpirun or srun")
    verb.add_argument(
        "--max-restarts",
        type=not_negative,
        default=0,
        help="how often in all the job is started again, from its last complete checkpoint, where it fails (default: 0)",
    )
    verb.set_defaults(work=_train)
