"""A Hugging Face folder becomes a run folder: a checkpoint of weights only, the tokenizer, and a configuration to train with.

Weights are read and written one after the other, n-gram tables file by file.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from overtok_megatron.checkpoint.dense import open_tensors
from overtok_megatron.checkpoint.weights_only import write_weights
from overtok_megatron.config.loading import save_resolved
from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, RunConfig
from overtok_megatron.config.wording import line
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.errors import CheckpointError
from overtok_megatron.files import read_text, refuse_used_folder
from overtok_megatron.interchange.exporting import TABLES_INDEX
from overtok_megatron.interchange.hugging_face import model_section, require_transformers, to_ours
from overtok_megatron.interchange.tensor_files import TensorFiles
from overtok_megatron.run_folder import TOKENIZER_FILES, RunFolder
from overtok_megatron.run_lock import hold

_ENCODER = "over_encoding."  # of names in an exported folder


def import_folder(source: Path, run: Path, *, tokenizer: Path | None = None, eod_token: str | None = None) -> Path:
    """Write the model of a Hugging Face folder below the run folder `run`; returns the checkpoint's folder.

    tokenizer: a tokenizer.json or sentencepiece model instead of the folder's own. eod_token: what ends documents instead
    of the model's end-of-sequence token. Raises CheckpointError or DataError, naming what is not supported, OutputError where
    `run` holds files; nothing is left.
    """
    config_file = source / "config.json"
    try:
        raw: dict[str, Any] = json.loads(read_text(config_file))
        own = raw.get("overtok")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{config_file}: unreadable ({error}); name a folder that save_pretrained wrote"
        ) from None
    files = TensorFiles(source)
    try:
        if own is None:
            model, over = model_section(complete(raw, config_file), str(config_file)), OverEncodingConfig()
        else:
            model = ModelConfig.model_validate(own["model"])
            over = OverEncodingConfig.model_validate(own["over_encoding"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(line(config_file, f"{key}: {first['input']!r}; {first['msg']}")) from None
    refuse_used_folder(run)
    with hold(run, "overtok import"):
        return _write(source, run, raw, files, (model, over), tokenizer=tokenizer, eod_token=eod_token)


def _write(
    source: Path,
    run: Path,
    raw: dict[str, Any],
    files: TensorFiles,
    sections: tuple[ModelConfig, OverEncodingConfig],
    *,
    tokenizer: Path | None,
    eod_token: str | None,
) -> Path:
    model, over = sections
    refuse_used_folder(run)  # once more: another import may have been faster
    own = raw.get("overtok")
    try:
        section, eod_id, fingerprint = _copy_tokenizer(source, run, raw, tokenizer, eod_token, model.vocab_size)
        config = run_config(raw, model, over, section, (own or {}).get("precision") or _precision(files), run)
        path = write_weights(
            run, config, _dense(files, model), _rows(source) if over.enabled else (),
            eod_id=eod_id, tokenizer_fingerprint=fingerprint,
        )  # fmt: skip
        save_resolved(config, RunFolder(run).config)
    except CheckpointError as error:
        shutil.rmtree(run, ignore_errors=True)
        raise CheckpointError(f"{source}: {error}") from None
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        raise
    return path


def complete(raw: dict[str, Any], place: Path) -> dict[str, Any]:
    """A configuration with all of its family's defaults, in the form of the transformers release that is installed."""
    transformers = require_transformers()
    family = raw.get("model_type")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it judges ids of special tokens
    if family not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"{place}: model_type: {family}; unknown to transformers {transformers.__version__}")
    try:
        values: dict[str, Any] = transformers.CONFIG_MAPPING[family].from_dict(raw).to_dict()
    except Exception as error:  # the library checks types with errors of its own, which are no ValueErrors
        raise CheckpointError(line(place, f"not a configuration of {family}: {error}")) from None
    return values


def run_config(
    raw: dict[str, Any],
    model: ModelConfig,
    over: OverEncodingConfig,
    tokenizer: dict[str, Any],
    precision: str,
    run: Path,
) -> RunConfig:
    """Everything that a run needs; data.train is for the user to set."""
    return RunConfig.model_validate(
        {
            "model": model.model_dump(mode="json"),
            "over_encoding": over.model_dump(mode="json"),
            "tokenizer": tokenizer,
            "data": {"train": "data/train", "seq_length": raw.get("max_position_embeddings", 2048)},
            "optimizer": {"learning_rate": 2e-5, "warmup_iters": 10},
            "training": {
                "output_directory": str(run),
                "micro_batch_size": 1,
                "global_batch_size": 8,
                "train_iters": 1000,
                "precision": precision,
            },
        }
    )


def _precision(files: TensorFiles) -> str:
    """bf16 where the weights are; float16 has more digits and becomes float32."""
    dtype = files.read(files.names[0]).dtype
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def _dense(files: TensorFiles, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    encoder = [name for name in files.names if name.startswith(_ENCODER)]
    backbone = [name for name in files.names if not name.startswith(_ENCODER)]
    for name, weight in to_ours(model, backbone, files.read):
        yield name, weight.float() if weight.dtype == torch.float16 else weight
    for name in encoder:
        yield f"embedding.{name}", files.read(name)


def _rows(source: Path) -> Iterator[tuple[int, dict[str, Tensor]]]:
    index = source / TABLES_INDEX
    try:
        entries = json.loads(read_text(index))["files"]
        files = [(str(name), int(start)) for name, start, _ in entries]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{index}: unreadable ({error})") from None
    for name, start in files:
        with open_tensors(source / name) as file:
            yield start, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping


def _copy_tokenizer(
    source: Path, run: Path, raw: dict[str, Any], given: Path | None, eod_token: str | None, vocab_size: int
) -> tuple[dict[str, Any], int, str]:
    """(tokenizer section, id that ends documents, fingerprint) of the tokenizer, whose file now lies in `run`."""
    own = raw.get("overtok") or {}
    if given is not None:
        kind, path = ("hugging_face" if given.suffix == ".json" else "sentencepiece"), given
    elif own:
        kind, path = own["tokenizer"]["type"], source / TOKENIZER_FILES.get(own["tokenizer"]["type"], "")
        eod_token = eod_token or own["tokenizer"]["eod_token"]
    else:
        kind = "hugging_face" if (source / TOKENIZER_FILES["hugging_face"]).is_file() else "sentencepiece"
        path = source / TOKENIZER_FILES[kind]
        if not path.is_file():
            raise CheckpointError(f"holds neither {' nor '.join(TOKENIZER_FILES.values())}; name one with --tokenizer")
    if kind == "hugging_face" and eod_token is None:
        eod_token = _token_of(path, raw.get("eos_token_id"))
    loaded = load_tokenizer(kind, None if kind == "bytes" else path, eod_token)
    if loaded.vocab_size > vocab_size:
        raise CheckpointError(
            f"{path}: has {loaded.vocab_size} tokens, the model's vocabulary is {vocab_size}; name the model's own tokenizer"
        )
    section: dict[str, Any] = {"type": kind, "path": None, "eod_token": eod_token}
    run.mkdir(parents=True, exist_ok=True)
    if kind != "bytes":
        target = run / TOKENIZER_FILES[kind]
        try:
            shutil.copyfile(path, target)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from None
        section["path"] = str(target)
    return section, loaded.eod_id, loaded.fingerprint()


def _token_of(file: Path, ids: int | list[int] | None) -> str | None:
    """The text of the model's (first) end-of-sequence token, None where it names none."""
    number = ids[0] if isinstance(ids, list) else ids
    try:
        added = json.loads(read_text(file)).get("added_tokens", [])
        return next((str(token["content"]) for token in added if token["id"] == number), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # loading it says what is wrong
