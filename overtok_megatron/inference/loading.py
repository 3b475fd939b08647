"""A checkpoint of any layout, as a plain model on one device with its tables in memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

from overtok_megatron.checkpoint.dense import load_dense
from overtok_megatron.checkpoint.store import Manifest, find_checkpoint, read_manifest, verify_file
from overtok_megatron.checkpoint.tables import load_tables
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.tokenizer import Tokenizer, load_tokenizer
from overtok_megatron.errors import CheckpointError
from overtok_megatron.model.assembly import build_tables, build_transformer
from overtok_megatron.model.transformer import Transformer
from overtok_megatron.ngram.embedding import OverTables


@dataclass(frozen=True)
class TrainedModel:
    """model in evaluation mode; tables None for a plain model."""

    config: RunConfig
    model: Transformer
    tables: OverTables | None
    tokenizer: Tokenizer
    step: int


def load_trained(run: Path, device: torch.device) -> TrainedModel:
    """Load the model that `run` names.

    Raises CheckpointError where files are missing, damaged or do not fit, and where the tokenizer is another one.
    """
    path = find_checkpoint(run)
    manifest = read_manifest(path)
    for name in manifest.files:
        if name.endswith(".safetensors"):  # what is read here; a flipped byte would be a wrong text, not an error
            verify_file(path, name, manifest)
    config = RunConfig.model_validate(manifest.config)
    tokenizer = load_tokenizer(config.tokenizer.type, config.tokenizer.path)
    _check_tokenizer(tokenizer, manifest, config, path)
    model = build_transformer(config, device=device)
    weights = load_dense(path, manifest.layout["pipeline_parallel_size"] * manifest.layout["tensor_parallel_size"])
    if config.model.tie_word_embeddings:
        weights = {name: weight for name, weight in weights.items() if name in dict(model.named_parameters())}
    _copy_weights(model, weights, path)
    tables = None
    if config.over_encoding.enabled:
        tables = build_tables(config, model.embedding.over_encoding, manifest.eod_id, device=device)
        load_tables(path, tables, with_optimizer=False)
    return TrainedModel(config, model.eval(), tables, tokenizer, manifest.step)


def _check_tokenizer(tokenizer: Tokenizer, manifest: Manifest, config: RunConfig, path: Path) -> None:
    if tokenizer.fingerprint() != manifest.tokenizer_fingerprint:
        raise CheckpointError(
            f"{config.tokenizer.path}: not the tokenizer that {path} was trained with "
            f"(SHA-256 {tokenizer.fingerprint()[:12]}, expected {manifest.tokenizer_fingerprint[:12]}); "
            "put the original back"
        )


def _copy_weights(model: Transformer, weights: dict[str, torch.Tensor], path: Path) -> None:
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        name = sorted(parameters.keys() ^ weights.keys())[0]
        raise CheckpointError(f"{path}: weight {name} is not on both sides; written by another version?")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(weights[name].shape)}, the model needs {list(parameter.shape)}"
                )
            parameter.copy_(weights[name])
