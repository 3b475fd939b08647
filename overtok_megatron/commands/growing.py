"""`overtok grow`."""

import argparse
from pathlib import Path
from typing import Any

from overtok_megatron.commands.model_arguments import add_tokenizer, carried_tokenizer, carry_tokenizer, tokenizer_of


def _grow(options: argparse.Namespace) -> int:
    from overtok_megatron.checkpoint.growing import SCRATCH, grow
    from overtok_megatron.checkpoint.store import find_checkpoint, read_manifest
    from overtok_megatron.config.growth import grow_config, parse_tables
    from overtok_megatron.config.loading import change_config, save_resolved
    from overtok_megatron.config.moved_runs import run_of, with_current_paths
    from overtok_megatron.config.schema import RunConfig
    from overtok_megatron.errors import ConfigError
    from overtok_megatron.files import refuse_used_folder
    from overtok_megatron.run_folder import CHECKPOINTS, RunFolder
    from overtok_megatron.run_lock import hold

    source, output = find_checkpoint(Path(options.run)), Path(options.output)
    manifest, run = read_manifest(source), run_of(source)
    old = with_current_paths(RunConfig.model_validate(manifest.config), run)
    section, reason = carried_tokenizer(old, run, manifest.tokenizer_fingerprint, tokenizer_of(options))
    old = old.model_copy(update={"tokenizer": section or old.tokenizer})
    tables = [parse_tables(text) for text in options.tables]
    grown = grow_config(old, tables, freeze=options.freeze, multi_token_depth=options.multi_token_prediction)
    refuse_used_folder(output, allowed=(CHECKPOINTS, SCRATCH))  # these two a killed call leaves
    start = {"output_directory": str(output), "initial_checkpoint": None, "resume": "auto"}  # from what grow writes
    grown = grown.model_copy(update={"training": grown.training.model_copy(update=start)})
    loaded = change_config(grown, options.overrides, "--tables" if tables else "--multi-token-prediction")
    directory = loaded.config.training.output_directory
    if directory != str(output):
        raise ConfigError(f"training.output_directory: {directory}; --output says where the new run lies: leave it out")
    with hold(output, "overtok grow"):
        path = grow(source, output, loaded.config, loaded.locate)
        carry_tokenizer(section, reason, output)
        save_resolved(loaded.config, RunFolder(output).config)
    what = " and ".join(
        ["more tables"] * bool(tables) + ["heads for later tokens"] * bool(options.multi_token_prediction)
    )
    print(f"{path}: the model of {source} with {what}; go on with overtok train {RunFolder(output).config}")
    return 0


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser(
        "grow",
        help="give a trained model more n-gram tables or multi-token prediction; no logit changes before training",
    )
    verb.add_argument("run", help="a run's output folder (its latest checkpoint), or one of its checkpoints")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="other values for the new run")
    verb.add_argument("--output", required=True, help="run folder to write to")
    add_tokenizer(verb)
    verb.add_argument(
        "--tables",
        action="append",
        default=[],
        metavar="orders=2-3,slices=2,rows=M",
        help="tables to add: n-gram lengths, tables for each, rows of the first; may be repeated",
    )
    verb.add_argument(
        "--multi-token-prediction",
        type=int,
        metavar="D",
        help="how many depths of multi-token prediction the grown model has; each is a block that predicts one token further",
    )
    verb.add_argument("--freeze", action="store_true", help="rows of the tables that are there take no more updates")
    verb.set_defaults(work=_grow)
