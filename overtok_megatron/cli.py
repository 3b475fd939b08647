"""One command, `overtok`, with a verb for each job. Every verb is a thin call into one room; a user's mistake is one line."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overtok_megatron import __version__
from overtok_megatron.errors import OvertokError


def _config(options: argparse.Namespace) -> int:
    from overtok_megatron.config.loading import load_config
    from overtok_megatron.config.report import describe
    from overtok_megatron.config.validation import validate

    loaded = load_config(options.config, options.overrides)
    validate(loaded.config, options.processes, loaded.locate)
    print(describe(loaded, options.processes))
    return 0


def _train(options: argparse.Namespace) -> int:
    from overtok_megatron.config.loading import load_config
    from overtok_megatron.launch import launch

    return launch(load_config(options.config, options.overrides), options.processes, options.master_port)


def _prepare(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from overtok_megatron.data.prepare import expand, prepare
    from overtok_megatron.data.tokenizer import load_tokenizer

    files = expand(options.inputs)
    tokenizer = load_tokenizer("sentencepiece", options.tokenizer)
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc=str(options.output), disable=None) as bar:
        manifest = prepare(files, options.output, tokenizer, bar.update, options.separator)
    print(f"{options.output}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from overtok_megatron.data.indexed import IndexedDataset

    for prefix in options.prefixes:
        IndexedDataset(prefix).verify()
        print(f"{prefix}: as it was written")
    return 0


def _train_tokenizer(options: argparse.Namespace) -> int:
    from overtok_megatron.data.prepare import expand
    from overtok_megatron.data.tokenizer import load_tokenizer, train_sentencepiece

    train_sentencepiece(expand(options.inputs), options.vocab_size, Path(options.output))
    tokenizer = load_tokenizer("sentencepiece", options.output)
    print(f"{options.output}: {tokenizer.vocab_size} pieces, end of document is {tokenizer.eod_id}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    import torch

    from overtok_megatron.inference.generation import Sampling, generate
    from overtok_megatron.inference.loading import load_trained

    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(Path(options.run), device, options.storage)
    for prompt, text in zip(options.prompt, generate(trained, options.prompt, sampling), strict=True):
        print(f"{prompt}{text}")
    return 0


def _inspect_checkpoint(options: argparse.Namespace) -> int:
    from overtok_megatron.checkpoint.report import describe
    from overtok_megatron.checkpoint.store import find_checkpoint

    print(describe(find_checkpoint(Path(options.checkpoint))))
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
    from overtok_megatron.checkpoint.store import find_checkpoint
    from overtok_megatron.training.reshaping import reshape

    source = find_checkpoint(Path(options.checkpoint))
    output = Path(options.output) if options.output else source.parent.parent
    print(f"{reshape(source, output)}: whole parameters, for any layout")
    return 0


def _prune_checkpoints(options: argparse.Namespace) -> int:
    from overtok_megatron.checkpoint.store import CheckpointStore

    for path in CheckpointStore(Path(options.run)).prune(options.keep_last, options.keep_every):
        print(f"{path}: removed")
    return 0


def _add_checkpoint_verbs(verbs: Any) -> None:
    """`overtok checkpoint inspect | verify | reshape | prune`."""
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
    verb.add_argument("--keep-last", type=_positive, required=True, help="newest ones to keep")
    verb.add_argument("--keep-every", type=_positive, default=None, help="keep those of steps that this divides, too")
    verb.set_defaults(work=_prune_checkpoints)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.add_argument(
        "--processes", type=_positive, default=None, help="ranks on this host (default: its GPUs, or 1)"
    )


def _separator(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty separator splits nothing")
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(prog="overtok", description="Pretrain over-tokenized transformers.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="verb")

    verb = verbs.add_parser("config", help="print a configuration resolved, with what follows from it")
    _add_overrides(verb)
    verb.set_defaults(work=_config)

    verb = verbs.add_parser("train", help="train, on one or more ranks of this host")
    _add_overrides(verb)
    verb.add_argument(
        "--master-port", type=_positive, default=None, help="port of the first rank (default: a free one)"
    )
    verb.set_defaults(work=_train)

    verb = verbs.add_parser("train-tokenizer", help="train a sentencepiece tokenizer on text files")
    verb.add_argument("inputs", nargs="+", help="text files, or folders of .txt files")
    verb.add_argument("--vocab-size", type=_positive, required=True, help="pieces")
    verb.add_argument("--output", required=True, help="model file to write")
    verb.set_defaults(work=_train_tokenizer)

    verb = verbs.add_parser("prepare", help="turn text files into an indexed dataset")
    verb.add_argument("inputs", nargs="+", help="text files, patterns, or folders of .txt files; one document a file")
    verb.add_argument("--tokenizer", required=True, help="sentencepiece model file")
    verb.add_argument("--output", required=True, help="prefix of the dataset's files")
    verb.add_argument(
        "--separator",
        type=_separator,
        default=None,
        help=r"text between documents of a file, as '\n\n\n' (default: none)",
    )
    verb.set_defaults(work=_prepare)

    verb = verbs.add_parser("verify", help="hash datasets again and compare with what was written")
    verb.add_argument("prefixes", nargs="+", metavar="prefix", help="prefix of a dataset's files")
    verb.set_defaults(work=_verify)

    _add_checkpoint_verbs(verbs)

    verb = verbs.add_parser("generate", help="continue prompts with a trained model")
    verb.add_argument("run", help="a run's output folder, or one of its checkpoints")
    verb.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    verb.add_argument("--max-new-tokens", type=int, default=64)
    verb.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    verb.add_argument("--top-k", type=int, default=0, help="0 = off")
    verb.add_argument("--top-p", type=float, default=1.0, help="1 = off")
    verb.add_argument("--seed", type=int, default=0, help="of sampling")
    verb.add_argument(
        "--storage",
        choices=("device", "host", "mapped"),
        default="device",
        help="n-gram tables beside the model, in host memory, or left on disk (memory then does not depend on their size)",
    )
    verb.set_defaults(work=_generate)
    return parser


def default_processes() -> int:
    """One rank a GPU, or one."""
    import torch

    return max(1, torch.cuda.device_count())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0, 2 for a user's mistake, or the launcher's."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes positionals in one run: overrides behind an option come back here
        options.overrides += rest
    try:
        if getattr(options, "processes", 1) is None:
            options.processes = default_processes()
        code: int = options.work(options)
    except OvertokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
