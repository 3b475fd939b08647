"""`overtok train-tokenizer | prepare | verify`."""

import argparse
from pathlib import Path
from typing import Any

from overtok_megatron.commands.arguments import positive


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


def _separator(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty separator splits nothing")
    return text.replace("\\n", "\n").replace("\\t", "\t")


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser("train-tokenizer", help="train a sentencepiece tokenizer on text files")
    verb.add_argument("inputs", nargs="+", help="text files, or folders of .txt files")
    verb.add_argument("--vocab-size", type=positive, required=True, help="pieces")
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
