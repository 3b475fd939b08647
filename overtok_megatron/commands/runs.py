"""`overtok config | train`."""

import argparse
import sys
from typing import Any

from overtok_megatron.commands.arguments import port, positive


def _config(options: argparse.Namespace) -> int:
    from overtok_megatron.config.validation import validate
    from overtok_megatron.launching.preparation import load_run
    from overtok_megatron.planning.config_report import describe

    loaded = load_run(options.config, options.overrides, _note)
    validate(loaded.config, options.processes, loaded.locate)
    print(describe(loaded, options.processes))
    return 0


def _train(options: argparse.Namespace) -> int:
    from overtok_megatron.launching.local import launch
    from overtok_megatron.launching.preparation import load_run

    loaded = load_run(options.config, options.overrides, _note)
    return launch(loaded, options.processes, options.master_port)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.add_argument("--processes", type=positive, default=None, help="ranks on this host (default: its GPUs, or 1)")


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser("config", help="print a configuration resolved, with what follows from it")
    _add_overrides(verb)
    verb.set_defaults(work=_config)

    verb = verbs.add_parser("train", help="train, on one or more ranks of this host")
    _add_overrides(verb)
    verb.add_argument("--master-port", type=port, default=None, help="port of the first rank (default: a free one)")
    verb.set_defaults(work=_train)
