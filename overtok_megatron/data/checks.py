"""Whether a run's tokenizer, datasets and model fit together: asked before a process is spawned, and in every process."""

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from overtok_megatron.config.schema import RunConfig, WeightedSet
from overtok_megatron.data.blending import BlendOrder, WeightedDataset
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.tokenizer import load_tokenizer
from overtok_megatron.errors import CheckpointError, DataError


@dataclass(frozen=True)
class RunData:
    """The opened datasets of a run and the identity of their tokenizer."""

    train: list[WeightedDataset]
    validation: IndexedDataset | None
    eod_id: int
    tokenizer_fingerprint: str
    tokenizer_path: str

    def refuse_tokenizer(self, checkpoint: Path) -> NoReturn:
        """Raise CheckpointError: `checkpoint` was trained with another tokenizer."""
        raise CheckpointError(
            f"{self.tokenizer_path}: not the tokenizer that {checkpoint} was trained with; put the original "
            "back, or set another training.output_directory"
        )


def open_run_data(config: RunConfig) -> RunData:
    """Open what the tokenizer and data sections name.

    Raises DataError where a file is missing or damaged, where a dataset was made with another tokenizer, where the
    vocabulary is not the model's, or where a set is too short.
    """
    given = config.tokenizer
    tokenizer = load_tokenizer(given.type, given.path, given.eod_token)
    name = given.path or given.type
    given_sets = (
        config.data.train if isinstance(config.data.train, list) else [WeightedSet(path=config.data.train, weight=1.0)]
    )
    train = [WeightedDataset(IndexedDataset(one.path), one.weight) for one in given_sets]
    validation = None if config.data.validation is None else IndexedDataset(config.data.validation)
    if tokenizer.vocab_size > config.model.vocab_size:  # fewer are well: imported models have rows that no token uses
        raise DataError(
            f"tokenizer {name}: has {tokenizer.vocab_size} pieces, model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size}"
        )
    for dataset in (*(one.dataset for one in train), validation):
        if dataset is None:
            continue
        made_by = dataset.manifest
        if made_by.tokenizer_fingerprint != tokenizer.fingerprint():
            raise DataError(
                f"{dataset.prefix}: was prepared with another tokenizer than {name}; prepare "
                "it again with `overtok prepare`, or correct tokenizer.path"
            )
        if made_by.eod_id != tokenizer.eod_id:
            raise DataError(
                f"{dataset.prefix}: its documents end with token {made_by.eod_id}, the tokenizer's with {tokenizer.eod_id}; "
                "prepare it again with `overtok prepare`, or correct tokenizer.eod_token"
            )
    BlendOrder(train, config.data.seq_length, config.data.shuffle_seed)
    if validation is not None and validation.num_tokens < 2:
        raise DataError(f"{validation.prefix}: holds {validation.num_tokens} tokens, nothing to validate on")
    return RunData(train, validation, tokenizer.eod_id, tokenizer.fingerprint(), name)
