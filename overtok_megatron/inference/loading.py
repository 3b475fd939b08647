"""Load a checkpoint that any layout wrote as a model on one device, with its n-gram tables in memory or on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from overtok_megatron.checkpoint.dense import read_parts
from overtok_megatron.checkpoint.rows_on_disk import RowsOnDisk
from overtok_megatron.checkpoint.store import Manifest, find_checkpoint, read_manifest, verify_file
from overtok_megatron.checkpoint.table_file import FOLDER
from overtok_megatron.checkpoint.tables import load_rows
from overtok_megatron.config.moved_runs import run_of, with_current_paths
from overtok_megatron.config.schema import Precision, RunConfig
from overtok_megatron.data.tokenizers.kept import find_tokenizer
from overtok_megatron.data.tokenizers.loading import configured_tokenizer
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.errors import CheckpointError
from overtok_megatron.kernels.choice import Kernels, choose_kernels, choose_row_kernels
from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.model.assembly import build_transformer
from overtok_megatron.model.transformer import Transformer
from overtok_megatron.ngram.building import build_family, build_row_store, build_table_reader
from overtok_megatron.ngram.families import TableFamily
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.ngram.row_store import RowReader
from overtok_megatron.ngram.sharded_tables import TableReader


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model in evaluation mode, with its tokenizer. tables: None for a plain model. step: the training step that saved it."""

    config: RunConfig
    model: Transformer
    tables: TableReader | None
    tokenizer: Tokenizer
    step: int

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of keys and values."""
        return next(self.model.parameters()).dtype

    def fetch_rows(self, tokens: torch.Tensor, history: torch.Tensor | None = None) -> FetchedRows | None:
        """The rows of the n-grams of tokens int64 [b, s] (history [b, n - 1]: the tokens before); None for a plain model."""
        return None if self.tables is None else self.tables.fetch_rows(tokens, history=history)


Storage = Literal["device", "host", "mapped"]
STORAGES: tuple[Storage, ...] = get_args(Storage)


def load_trained(
    run: Path,
    device: torch.device,
    storage: Storage = "device",
    precision: Precision | None = None,
    tokenizer_path: Path | None = None,
) -> TrainedModel:
    """Load the latest checkpoint of the run `run`, or the checkpoint `run`, as a model on `device`.

    storage: n-gram tables beside the model, in host memory, or left on disk, where rows are read as they are needed. The
    checksums of files that stay on disk are not compared, because they are as large as the tables (`overtok checkpoint verify`
    compares them).
    precision: to compute in; None = that of training.
    tokenizer_path: where the run's tokenizer is; None = it is looked for in the run's folder, and where it was in training.
    The configuration of the result names files where they are now.
    Raises CheckpointError where files are missing, damaged or do not fit, and where the tokenizer is another one.
    """
    path = find_checkpoint(run)
    manifest = read_manifest(path)
    _verify_files(path, manifest, storage)
    config = _config_to_load(path, manifest, storage, precision, tokenizer_path)
    tokenizer = configured_tokenizer(config.tokenizer)
    _check_tokenizer(tokenizer, manifest, config, path)
    # apex or liger-kernel may be missing here; they are for training
    kernels = choose_kernels("torch" if config.training.kernels == "torch" else "auto", device)
    model = build_transformer(config, device=device, kernels=kernels, eod_id=manifest.eod_id)
    weights = dict(read_parts(path, manifest.layout.model_parallel_ranks))
    if config.model.tie_word_embeddings:
        weights = {name: weight for name, weight in weights.items() if name in dict(model.named_parameters())}
    _copy_weights(model, weights, path)
    tables = None
    if config.over_encoding.enabled:
        family = build_family(config, manifest.eod_id, kernels.rows)
        store = _open_rows(path, config, family, storage, device, kernels)
        tables = build_table_reader(config, family, store, device=device, kernels=kernels)
    return TrainedModel(config=config, model=model.eval(), tables=tables, tokenizer=tokenizer, step=manifest.step)


def _verify_files(path: Path, manifest: Manifest, storage: Storage) -> None:
    """Compare the checksums of the files that will be read: a flipped byte would give a wrong text, not an error."""
    for name in manifest.files:
        stays_on_disk = storage == "mapped" and name.startswith(FOLDER)
        if name.endswith(".safetensors") and not stays_on_disk:
            verify_file(path, name, manifest)


def _config_to_load(
    path: Path, manifest: Manifest, storage: Storage, precision: Precision | None, tokenizer_path: Path | None
) -> RunConfig:
    """The checkpoint's configuration, with files where they are now and the caller's precision and storage."""
    config = RunConfig.model_validate(manifest.config)
    section = find_tokenizer(config, run_of(path), manifest.tokenizer_fingerprint, tokenizer_path)
    config = with_current_paths(config, run_of(path)).model_copy(update={"tokenizer": section})
    if precision is not None:
        config = config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})
    if storage != "mapped":
        over = config.over_encoding.model_copy(update={"storage": storage, "ranks_per_host": None})
        config = config.model_copy(update={"over_encoding": over})
    return config


def _open_rows(
    path: Path, config: RunConfig, family: TableFamily, storage: Storage, device: torch.device, kernels: Kernels
) -> RowReader:
    """All rows of a checkpoint. device: where the model computes, with its kernels."""
    if storage == "mapped":
        return RowsOnDisk(path, family.total_rows, family.width, RowKernels())
    row_device = device if storage == "device" else torch.device("cpu")
    row_kernels = kernels.rows if row_device == device else choose_row_kernels(config.training.kernels, row_device)
    store = build_row_store(config, family, device=row_device, kernels=row_kernels)
    load_rows(path, store)
    return store


def _check_tokenizer(tokenizer: Tokenizer, manifest: Manifest, config: RunConfig, path: Path) -> None:
    if tokenizer.fingerprint() != manifest.tokenizer_fingerprint:
        raise CheckpointError(
            f"{config.tokenizer.path or config.tokenizer.type}: not the tokenizer that {path} was trained with "
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
