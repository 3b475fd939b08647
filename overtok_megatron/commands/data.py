"""`overtok train-tokenizer | prepare | adopt | verify`."""

import argparse
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overtok_megatron.commands.arguments import positive, workers
from overtok_megatron.data.preparing.sources import FORMATS, ReadOptions
from overtok_megatron.errors import DataError
from overtok_megatron.files import shown
from overtok_megatron.run_folder import RunFolder

if TYPE_CHECKING:
    from overtok_megatron.data.tokenizers.protocol import Tokenizer


def _tokenizer(options: argparse.Namespace) -> "Tokenizer":
    from overtok_megatron.data.tokenizers.loading import infer_kind, load_tokenizer

    path = None if options.tokenizer == "bytes" else Path(options.tokenizer)
    if path is not None and (config := RunFolder(path).config).is_file():
        return _tokenizer_of_run(config, options)
    kind = options.tokenizer_type or ("bytes" if path is None else infer_kind(path))
    if kind == "bytes" and (path is not None or options.eod_token is not None):
        raise DataError(
            "--tokenizer-type: bytes has neither a file nor a choice of tokens; write --tokenizer bytes alone"
        )
    if kind != "bytes" and path is None:
        raise DataError(f"--tokenizer: bytes is no file for --tokenizer-type {kind}; name one")
    return load_tokenizer(kind, path, options.eod_token)


def _tokenizer_of_run(path: Path, options: argparse.Namespace) -> "Tokenizer":
    from overtok_megatron.checkpoint.store import CheckpointStore, read_manifest
    from overtok_megatron.config.loading import load_config
    from overtok_megatron.data.tokenizers.kept import find_tokenizer
    from overtok_megatron.data.tokenizers.loading import configured_tokenizer

    for flag, value in (("--tokenizer-type", options.tokenizer_type), ("--eod-token", options.eod_token)):
        if value is not None:
            raise DataError(f"{flag}: {value}; --tokenizer names a run, {path}, which says it: leave the flag out")
    trained = CheckpointStore(path.parent).latest()
    fingerprint = None if trained is None else read_manifest(trained).tokenizer_fingerprint
    section = find_tokenizer(load_config(path).config, path.parent, fingerprint)
    return configured_tokenizer(section)


def _reading(options: argparse.Namespace) -> ReadOptions:
    return ReadOptions(format=options.format, key=options.key, separator=options.separator)


def _prepare(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from overtok_megatron.data.preparing.inputs import find_inputs
    from overtok_megatron.data.preparing.ownership import output_paths
    from overtok_megatron.data.preparing.prepare import Plan, prepare_sets, sets_beside

    shares = None if options.split is None else _shares(options.split)
    plan = Plan(_reading(options), shares, workers=options.workers or len(os.sched_getaffinity(0)))
    inputs = find_inputs(
        options.inputs,
        plan.reading,
        outputs=output_paths(options.output, plan.prefixes(options.output)),
        tokenizer=None if options.tokenizer == "bytes" else Path(options.tokenizer),
    )
    tokenizer = _tokenizer(options)
    total = sum(path.stat().st_size for path in inputs.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc=shown(options.output), disable=None) as bar:
        prepared = prepare_sets(inputs.files, options.output, tokenizer, plan, bar.update)
    for prefix, manifest in prepared.manifests.items():
        print(f"{shown(prefix)}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens")
    for prefix in sets_beside(plan, options.output):
        print(f"{shown(prefix)}: an earlier set is still there; do not train or validate on documents of both")
    account = prepared.account
    account.files = inputs.left_out.with_others(account.files)
    print("\n".join(account.lines()))
    return 0


def _shares(given: list[float]) -> tuple[float, float, float]:
    train, validation, test = given
    if min(given) < 0 or not math.isclose(sum(given), 1.0, abs_tol=1e-6):
        raise DataError(
            f"--split: {train} {validation} {test}; three shares that add up to 1 are needed, as 0.98 0.01 0.01"
        )
    return train, validation, test


def _adopt(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from overtok_megatron.data.preparing.adopt import adopt

    tokenizer = _tokenizer(options)
    path = Path(f"{options.prefix}.bin")
    total = path.stat().st_size if path.is_file() else 0
    with tqdm(total=total, unit="B", unit_scale=True, desc=options.prefix, disable=None) as bar:
        manifest, ended = adopt(options.prefix, tokenizer, bar.update)
    print(
        f"{options.prefix}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens; "
        f"{ended:,} documents end with the end-of-document token {manifest.eod_id}"
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from overtok_megatron.data.indexed import IndexedDataset

    for prefix in options.prefixes:
        IndexedDataset(prefix).verify()
        print(f"{prefix}: as it was written")
    return 0


def _train_tokenizer(options: argparse.Namespace) -> int:
    from overtok_megatron.data.preparing.account import Account
    from overtok_megatron.data.preparing.inputs import find_inputs
    from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
    from overtok_megatron.data.tokenizers.loading import load_tokenizer

    output = Path(options.output)
    inputs = find_inputs(options.inputs, _reading(options), outputs=[output])
    train_sentencepiece(inputs.files, options.vocab_size, output, _reading(options))
    tokenizer = load_tokenizer("sentencepiece", options.output)
    print(f"{options.output}: {tokenizer.vocab_size} pieces, end of document is {tokenizer.eod_id}")
    account = Account(num_read=len(inputs.files), files=inputs.left_out)
    print("\n".join([*account.file_lines(), account.file_sums()]))
    return 0


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "\\": "\\"}


def _separator(text: str) -> str:
    r"""What `\n`, `\r`, `\t`, `\f`, `\v`, `\\`, `\x1e` and `\u2029` stand for; other backslashes are themselves."""
    if not text:
        raise argparse.ArgumentTypeError("an empty separator splits nothing")

    def unescaped(found: re.Match[str]) -> str:
        code = found[2] or found[3]
        return chr(int(code, 16)) if code else _ESCAPES[found[1]]

    result = re.sub(r"\\(?:([nrtfv\\])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))", unescaped, text)
    try:
        result.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!a} is not UTF-8, as texts are") from None
    return result


def _add_reading(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "inputs",
        nargs="+",
        help="files, patterns, or folders: .txt, .jsonl, .json, .ndjson, .parquet; also .gz, .xz, .zst",
    )
    verb.add_argument("--format", choices=FORMATS, default=None, help="of all inputs (default: by their names)")
    verb.add_argument("--key", default="text", help="key of JSON objects, or Parquet column, that holds the text")
    verb.add_argument(
        "--separator",
        type=_separator,
        default=None,
        help=r"text between documents of a text file, as '\n\n\n' or '\r\n\r\n' (default: none; each file is one document)",
    )


def _add_tokenizer(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--tokenizer",
        required=True,
        help="sentencepiece model, Hugging Face tokenizer.json, a run's folder (its tokenizer, with the token that ends its "
        "documents), or: bytes",
    )
    verb.add_argument(
        "--tokenizer-type",
        choices=("sentencepiece", "hugging_face", "bytes"),
        default=None,
        help="kind of the tokenizer (default: by the file's content)",
    )
    verb.add_argument("--eod-token", default=None, help="token that ends documents (default: </s>'s or <|endoftext|>)")


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser("train-tokenizer", help="train a sentencepiece tokenizer on a corpus")
    _add_reading(verb)
    verb.add_argument("--vocab-size", type=positive, required=True, help="pieces")
    verb.add_argument("--output", required=True, help="model file to write")
    verb.set_defaults(work=_train_tokenizer)

    verb = verbs.add_parser(
        "prepare", help="turn a corpus into an indexed dataset; given again after a kill, it goes on"
    )
    _add_reading(verb)
    _add_tokenizer(verb)
    verb.add_argument("--output", required=True, help="prefix of the dataset's files")
    verb.add_argument(
        "--split",
        type=float,
        nargs=3,
        metavar=("TRAIN", "VALIDATION", "TEST"),
        default=None,
        help="shares, as 0.98 0.01 0.01: by the hash of each document to PREFIX-train, PREFIX-validation, PREFIX-test",
    )
    verb.add_argument("--workers", type=workers, default=None, help="processes that encode (default: one per core)")
    verb.set_defaults(work=_prepare)

    verb = verbs.add_parser(
        "adopt", help="check a set that Megatron wrote and give it a manifest, so that it can be used"
    )
    verb.add_argument("prefix", help="prefix of the set's .bin and .idx")
    _add_tokenizer(verb)
    verb.set_defaults(work=_adopt)

    verb = verbs.add_parser("verify", help="hash datasets again and compare with what was written")
    verb.add_argument("prefixes", nargs="+", metavar="prefix", help="prefix of a dataset's files")
    verb.set_defaults(work=_verify)
