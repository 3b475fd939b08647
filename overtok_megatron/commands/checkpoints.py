"""`overtok checkpoint inspect | verify | reshape | prune`."""

import argparse
from pathlib import Path
from typing import Any

from overtok_megatron.commands.arguments import positive
from overtok_megatron.commands.model_arguments import carried_tokenizer, carry_tokenizer


def _inspect_checkpoint(options: argparse.Namespace) -> int:
    from overtok_megatron.checkpoint.inspection import describe_checkpoint
    from overtok_megatron.checkpoint.store import find_checkpoint

    print(describe_checkpoint(find_checkpoint(Path(options.checkpoint))))
    return 0


def _verify_checkpoint(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from overtok_megatron.checkpoint.store import MANIFEST, CheckpointStore, find_checkpoint, verify_checkpoint

    path = Path(options.checkpoint)
    find_checkpoint(path)  # the pointer of a run, or the folder itself
    all_of_run = [path] if (path / MANIFEST).is_file() else CheckpointStore(path).complete()
    for checkpoint in tqdm(all_of_run, unit="checkpoint", disable=None):
        verify_checkpoint(checkpoint)
        print(f"{checkpoint}: as it was written")
    return 0


def _reshape_checkpoint(options: argparse.Namespace) -> int:
    from overtok_megatron.checkpoint.store import find_checkpoint, read_manifest
    from overtok_megatron.config.moved_runs import run_of
    from overtok_megatron.config.schema import RunConfig
    from overtok_megatron.training.reshaping import reshape

    source = find_checkpoint(Path(options.checkpoint))
    output = Path(options.output) if options.output else source.parent.parent
    print(f"{reshape(source, output)}: whole parameters, for any layout")
    if options.output:
        manifest = read_manifest(find_checkpoint(output))
        config = RunConfig.model_validate(manifest.config)
        carry_tokenizer(*carried_tokenizer(config, run_of(source), manifest.tokenizer_fingerprint), output)
    return 0


def _prune_checkpoints(options: argparse.Namespace) -> int:
    from overtok_megatron.checkpoint.store import CheckpointStore
    from overtok_megatron.run_lock import hold

    run = Path(options.run)
    if not CheckpointStore(run).root.is_dir():
        return 0  # nothing to do, and perhaps not a run: no lock is put there
    with hold(run, "overtok checkpoint prune"):
        for path in CheckpointStore(run).prune(options.keep_last, options.keep_every):
            print(f"{path}: removed")
    return 0


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser("checkpoint", help="inspect, verify, reshape or prune checkpoints")
    verbs = parser.add_subparsers(required=True, metavar="verb")
    either = "a run's output folder (its latest checkpoint), or one of its checkpoints"

    verb = verbs.add_parser("inspect", help="print what a checkpoint holds")
    verb.add_argument("checkpoint", help=either)
    verb.set_defaults(work=_inspect_checkpoint)

    verb = verbs.add_parser("verify", help="hash every file again and compare with what was written")
    verb.add_argument("checkpoint", help="a run's output folder (all its checkpoints), or one of its checkpoints")
    verb.set_defaults(work=_verify_checkpoint)

    verb = verbs.add_parser(
        "reshape", help="write a checkpoint anew: whole parameters, increments merged, for any layout"
    )
    verb.add_argument("checkpoint", help=either)
    verb.add_argument("--output", default=None, help="run folder to write to (default: in place)")
    verb.set_defaults(work=_reshape_checkpoint)

    verb = verbs.add_parser("prune", help="remove old checkpoints of a run")
    verb.add_argument("run", help="a run's output folder")
    verb.add_argument("--keep-last", type=positive, required=True, help="newest ones to keep")
    verb.add_argument("--keep-every", type=positive, default=None, help="keep those of steps that this divides, too")
    verb.set_defaults(work=_prune_checkpoints)
