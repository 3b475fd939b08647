"""`overtok config | train`."""

import argparse
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overtok_megatron.commands.arguments import not_negative, port, positive
from overtok_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from overtok_megatron.config.loading import LoadedConfig


def _config(options: argparse.Namespace) -> int:
    from overtok_megatron.config.loading import load_config
    from overtok_megatron.config.validation import validate
    from overtok_megatron.planning.config_report import describe

    loaded = _where_it_lies(load_config(options.config, options.overrides), Path(options.config))
    validate(loaded.config, options.processes, loaded.locate)
    print(describe(loaded, options.processes))
    return 0


def _train(options: argparse.Namespace) -> int:
    from overtok_megatron.config.loading import load_config
    from overtok_megatron.launching.local import launch

    loaded = _where_it_lies(load_config(options.config, options.overrides), Path(options.config))
    return launch(loaded, options.processes, options.master_port, options.max_restarts)


def _where_it_lies(loaded: "LoadedConfig", path: Path) -> "LoadedConfig":
    """The configuration; where it is the file of a run that was moved, with the paths of the run as they are now."""
    from overtok_megatron.checkpoint.store import CheckpointStore, read_manifest
    from overtok_megatron.config.loading import COMMAND_LINE
    from overtok_megatron.config.moved_runs import find_moved_run, relocate
    from overtok_megatron.data.tokenizers.kept import find_tokenizer

    run = find_moved_run(loaded, path)
    if run is None:
        return loaded
    print(
        f"{path}: training.output_directory is {loaded.config.training.output_directory}, but the file lies in {run}: the run "
        f"goes on in {run}",
        file=sys.stderr,
    )
    moved = relocate(loaded, run)
    latest = CheckpointStore(run).latest()
    if latest is not None and loaded.locate("tokenizer.path") != COMMAND_LINE:
        with suppress(CheckpointError):  # a missing tokenizer is reported where the file is opened
            section = find_tokenizer(loaded.config, run, read_manifest(latest).tokenizer_fingerprint)
            return replace(moved, config=moved.config.model_copy(update={"tokenizer": section}))
    return moved


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
    verb.add_argument(
        "--max-restarts",
        type=not_negative,
        default=0,
        help="how often in all the job is started again, from its last complete checkpoint, where it fails (default: 0)",
    )
    verb.set_defaults(work=_train)
