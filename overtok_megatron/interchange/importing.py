"""A Hugging Face folder becomes a run folder: a checkpoint of weights only, the tokenizer, and a configuration to train with.

Weights are read and written one after the other, n-gram tables file by file.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from overtok_megatron.checkpoint.dense import open_tensors
from overtok_megatron.checkpoint.weights_only import write_weights
from overtok_megatron.config.derived import has_word_embedding
from overtok_megatron.config.loading import save_resolved
from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, RunConfig
from overtok_megatron.config.wording import line
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.errors import CheckpointError
from overtok_megatron.files import read_text, refuse_used_folder
from overtok_megatron.interchange.exporting import TABLES_INDEX
from overtok_megatron.interchange.families import model_section, require_transformers
from overtok_megatron.interchange.tensor_files import TensorFiles
from overtok_megatron.interchange.weight_names import WORD, to_ours
from overtok_megatron.run_folder import TOKENIZER_FILES, RunFolder
from overtok_megatron.run_lock import hold

_ENCODER = "over_encoding."  # of names in an exported folder


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A Hugging Face folder, and the sections that describe its model.

    values: config.json. exported: what `overtok export` put into it under `overtok`; empty where others wrote the folder.
    """

    path: Path
    values: dict[str, Any]
    exported: dict[str, Any]
    weights: TensorFiles
    model: ModelConfig
    over_encoding: OverEncodingConfig


@dataclass(frozen=True)
class _TokenizerChoice:
    """Which tokenizer a run gets: its type, its file (None for bytes), and the token that ends documents."""

    kind: str
    path: Path | None
    eod_token: str | None


def import_folder(source: Path, run: Path, *, tokenizer: Path | None = None, eod_token: str | None = None) -> Path:
    """Write the model of a Hugging Face folder below the run folder `run`; returns the checkpoint's folder.

    tokenizer: a tokenizer.json or sentencepiece model instead of the folder's own. eod_token: the token that ends documents
    instead of the model's end-of-sequence token. Raises CheckpointError or DataError, naming what is not supported,
    OutputError where `run` holds files; nothing is left.
    """
    folder = _read_folder(source)
    refuse_used_folder(run)
    with hold(run, "overtok import"):
        refuse_used_folder(run)  # once more: another import may have been faster
        try:
            return _write_run(folder, run, _choose_tokenizer(folder, tokenizer, eod_token))
        except CheckpointError as error:
            shutil.rmtree(run, ignore_errors=True)
            raise CheckpointError(f"{source}: {error}") from None
        except BaseException:
            shutil.rmtree(run, ignore_errors=True)
            raise


def _read_folder(source: Path) -> _Folder:
    config_file = source / "config.json"
    try:
        values: dict[str, Any] = json.loads(read_text(config_file))
        exported = values.get("overtok")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{config_file}: unreadable ({error}); name a folder that save_pretrained wrote"
        ) from None
    weights = TensorFiles(source)
    try:
        if exported is None:
            model = model_section(complete_values(values, config_file), str(config_file))
            over = OverEncodingConfig()
        else:
            model = ModelConfig.model_validate(exported["model"])
            over = OverEncodingConfig.model_validate(exported["over_encoding"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(line(config_file, f"{key}: {first['input']!r}; {first['msg']}")) from None
    return _Folder(
        path=source, values=values, exported=exported or {}, weights=weights, model=model, over_encoding=over
    )


def complete_values(values: dict[str, Any], config_file: Path) -> dict[str, Any]:
    """A configuration with all of its family's defaults, in the form of the transformers release that is installed."""
    transformers = require_transformers()
    family = values.get("model_type")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of ids of special tokens
    if family not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{config_file}: model_type: {family}; unknown to transformers {transformers.__version__}"
        )
    try:
        completed: dict[str, Any] = transformers.CONFIG_MAPPING[family].from_dict(values).to_dict()
    except Exception as error:  # the library checks types with errors of its own, which are not ValueErrors
        raise CheckpointError(line(config_file, f"not a configuration of {family}: {error}")) from None
    return completed


def _write_run(folder: _Folder, run: Path, choice: _TokenizerChoice) -> Path:
    tokenizer = _load_fitting(choice, folder.model.vocab_size)
    config = _run_config(folder, _copy_tokenizer(choice, run), run)
    path = write_weights(
        run,
        config,
        _dense(folder),
        _rows(folder.path) if folder.over_encoding.enabled else (),
        eod_id=tokenizer.eod_id,
        tokenizer_fingerprint=tokenizer.fingerprint(),
    )
    save_resolved(config, RunFolder(run).config)
    return path


def _run_config(folder: _Folder, tokenizer: dict[str, Any], run: Path) -> RunConfig:
    """Everything that a run needs; data.train is for the user to set. tokenizer: the section."""
    return RunConfig.model_validate(
        {
            "model": folder.model.model_dump(mode="json"),
            "over_encoding": folder.over_encoding.model_dump(mode="json"),
            "tokenizer": tokenizer,
            "data": {"train": "data/train", "seq_length": folder.values.get("max_position_embeddings", 2048)},
            "optimizer": {"learning_rate": 2e-5, "warmup_iters": 10},
            "training": {
                "output_directory": str(run),
                "micro_batch_size": 1,
                "global_batch_size": 8,
                "train_iters": 1000,
                "precision": folder.exported.get("precision") or _precision(folder.weights),
            },
        }
    )


def _precision(weights: TensorFiles) -> str:
    """bf16 where the weights are; float16 has more digits and becomes float32."""
    dtype = weights.read(weights.names[0]).dtype
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def _dense(folder: _Folder) -> Iterator[tuple[str, Tensor]]:
    """Our dense weights: those of the backbone, then those of the over-encoder, which has our names but for a prefix."""
    weights = folder.weights
    encoder = [name for name in weights.names if name.startswith(_ENCODER)]
    backbone = [name for name in weights.names if not name.startswith(_ENCODER)]
    for name, weight in to_ours(folder.model, backbone, weights.read):
        if name == WORD and not has_word_embedding(folder.over_encoding):
            if weight.any():
                raise CheckpointError(
                    f"{folder.path}: model.embed_tokens.weight is not zero, but the model was exported with "
                    "over_encoding.word_embedding: false; it was trained elsewhere, and cannot be imported"
                )
            continue
        yield name, weight.float() if weight.dtype == torch.float16 else weight
    for name in encoder:
        yield f"embedding.{name}", weights.read(name)


def _rows(source: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(first row id, columns) of the rows in an exported folder, file by file."""
    index = source / TABLES_INDEX
    try:
        entries = json.loads(read_text(index))["files"]
        files = [(str(name), int(start)) for name, start, _ in entries]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{index}: unreadable ({error})") from None
    for name, start in files:
        with open_tensors(source / name) as file:
            yield start, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping


def _choose_tokenizer(folder: _Folder, given: Path | None, eod_token: str | None) -> _TokenizerChoice:
    """The tokenizer that the user gives, that `overtok export` noted, or that lies in the folder, in this order."""
    path: Path | None
    if given is not None:
        kind, path = ("hugging_face" if given.suffix == ".json" else "sentencepiece"), given
    elif folder.exported:
        noted = folder.exported["tokenizer"]
        kind, eod_token = noted["type"], eod_token or noted["eod_token"]
        path = None if kind == "bytes" else folder.path / TOKENIZER_FILES.get(kind, "")
    else:
        kind = "hugging_face" if (folder.path / TOKENIZER_FILES["hugging_face"]).is_file() else "sentencepiece"
        path = folder.path / TOKENIZER_FILES[kind]
        if not path.is_file():
            raise CheckpointError(f"holds neither {' nor '.join(TOKENIZER_FILES.values())}; name one with --tokenizer")
    if kind == "hugging_face" and path is not None and eod_token is None:
        eod_token = _end_of_sequence(path, folder.values.get("eos_token_id"))
    return _TokenizerChoice(kind, path, eod_token)


def _end_of_sequence(tokenizer_file: Path, ids: int | list[int] | None) -> str | None:
    """The text of the model's (first) end-of-sequence token; None where the model names none."""
    number = ids[0] if isinstance(ids, list) else ids
    try:
        added = json.loads(read_text(tokenizer_file)).get("added_tokens", [])
        return next((str(token["content"]) for token in added if token["id"] == number), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # loading it says what is wrong


def _load_fitting(choice: _TokenizerChoice, vocab_size: int) -> Tokenizer:
    """Load a tokenizer. Raises CheckpointError where it has more tokens than the model."""
    tokenizer = load_tokenizer(choice.kind, choice.path, choice.eod_token)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{choice.path or choice.kind}: has {tokenizer.vocab_size} tokens, the model's vocabulary is {vocab_size}; "
            "name the model's own tokenizer"
        )
    return tokenizer


def _copy_tokenizer(choice: _TokenizerChoice, run: Path) -> dict[str, Any]:
    """Copy the tokenizer's file into the run folder; returns the tokenizer section of the run's configuration."""
    run.mkdir(parents=True, exist_ok=True)
    target = None
    if choice.path is not None:
        target = RunFolder(run).tokenizer(choice.kind)
        try:
            shutil.copyfile(choice.path, target)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None
    return {"type": choice.kind, "path": None if target is None else str(target), "eod_token": choice.eod_token}
