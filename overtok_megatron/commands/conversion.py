"""`overtok import | export`."""

import argparse
import re
import shutil
from pathlib import Path
from shlex import quote
from typing import Any

from overtok_megatron.commands.model_arguments import add_tokenizer, tokenizer_of
from overtok_megatron.run_folder import RunFolder

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def _import(options: argparse.Namespace) -> int:
    from overtok_megatron.interchange.importing import import_folder

    source, run = Path(options.folder), Path(options.output)
    tokenizer = None if options.tokenizer is None else Path(options.tokenizer)
    path = import_folder(source, run, tokenizer=tokenizer, eod_token=options.eod_token)
    if options.check:
        _compare(run, source, run, options.text, rounded=False)
    print(f"{path}: the weights of {source}")
    print(f"to go on: overtok prepare TEXTS --tokenizer {quote(str(run))} --output SET, then")
    print(f"overtok train {quote(str(RunFolder(run).config))} data.train=SET")
    return 0


def _export(options: argparse.Namespace) -> int:
    from overtok_megatron.checkpoint.store import find_checkpoint
    from overtok_megatron.interchange.exporting import ExportOptions, export_checkpoint

    source, output = find_checkpoint(Path(options.run)), Path(options.output)
    tokenizer = tokenizer_of(options)
    notes = export_checkpoint(source, output, ExportOptions(options.dtype, options.max_shard_size, tokenizer))
    if options.check:
        rounded = options.dtype in ("bfloat16", "float16")
        _compare(source, output, output, options.text, rounded=rounded, tokenizer=tokenizer)
    for note in notes:
        print(f"{output}: {note}")
    print(f"{output}: the model of {source} for transformers")
    return 0


def _compare(
    run: Path, folder: Path, made: Path, text: str | None, *, rounded: bool, tokenizer: Path | None = None
) -> None:
    """Print how far both models' logits are apart; where it is too far, or cannot be told, `made` is removed."""
    from overtok_megatron.errors import CheckpointError
    from overtok_megatron.interchange.logits_check import compare
    from overtok_megatron.interchange.sample_text import SAMPLE_TEXT

    try:
        found = compare(
            run, folder, SAMPLE_TEXT if text is None else _read(Path(text)), rounded=rounded, tokenizer=tokenizer
        )
        if not found.equal:
            raise CheckpointError(f"{made}: does not compute what the source does: {found}; removed")
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    print(found)


def _read(path: Path) -> str:
    from overtok_megatron.errors import DataError
    from overtok_megatron.files import EncodingError, read_text

    try:
        return read_text(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except EncodingError as error:
        raise DataError(f"{path}: {error}") from None


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 500MB or 5GB")
    return size


def _add_check(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--no-check", dest="check", action="store_false", help="do not compare logits (both models fit no memory)"
    )
    verb.add_argument("--text", default=None, help="text file to compare logits on (default: a passage of 300 words)")


def add_verbs(verbs: Any) -> None:
    verb = verbs.add_parser("import", help="make a run folder of a Hugging Face model: Olmo2, Olmo3, Llama, Olmoe")
    verb.add_argument("folder", help="folder with config.json, safetensors files and a tokenizer")
    verb.add_argument("--output", required=True, help="run folder to write")
    verb.add_argument("--tokenizer", default=None, help="tokenizer.json or sentencepiece model (default: the folder's)")
    verb.add_argument("--eod-token", default=None, help="token that ends documents (default: the model's eos token)")
    _add_check(verb)
    verb.set_defaults(work=_import)

    verb = verbs.add_parser("export", help="write a model for transformers")
    verb.add_argument("run", help="a run's output folder (its latest checkpoint), or one of its checkpoints")
    verb.add_argument("--output", required=True, help="folder to write")
    add_tokenizer(verb)
    verb.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=None,
        help="of dense weights (default: as they are)",
    )
    verb.add_argument("--max-shard-size", type=_size, default=5 * 10**9, help="of a file of weights (default: 5GB)")
    _add_check(verb)
    verb.set_defaults(work=_export)
