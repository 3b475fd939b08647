"""Opens a run's tokenizer and datasets, and checks that they fit the model: before processes start, and in each of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from overtok_megatron.config.derived import validation_sets
from overtok_megatron.config.schema import RunConfig, WeightedSet
from overtok_megatron.data.blending import BlendOrder, WeightedDataset, unique_names
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.tokenizers.loading import configured_tokenizer
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.errors import CheckpointError, DataError


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The opened datasets of a run and the identity of their tokenizer. validation: by name, "" = without one."""

    train: list[WeightedDataset]
    validation: dict[str, IndexedDataset]
    eod_id: int
    tokenizer_fingerprint: str
    tokenizer_path: str

    def fingerprints(self) -> dict[str, str]:
        """The SHA-256 of the tokens of each set, by the set's name: train/NAME, and validation/NAME (or validation/)."""
        names = unique_names([one.dataset.prefix for one in self.train])
        train = {f"train/{name}": one.dataset for name, one in zip(names, self.train, strict=True)}
        validation = {f"validation/{name}": dataset for name, dataset in self.validation.items()}
        return {name: dataset.manifest.bin_sha256 for name, dataset in (train | validation).items()}

    def changes_since(self, recorded: Mapping[str, str], checkpoint: Path) -> list[str]:
        """A line for each training set that is not what `checkpoint` recorded, and for each validation set of other tokens.

        recorded: its fingerprints; where there are none, nothing is known to have changed.
        """
        lines, now = [], self.fingerprints() if recorded else {}
        for name in sorted({*recorded, *now}):
            kind, _, own = name.partition("/")
            if recorded.get(name) == now.get(name) or (kind == "validation" and not (name in recorded and name in now)):
                continue
            if kind == "validation":
                key = f"data.validation.{own}" if own else "data.validation"
                lines.append(f"{key}: holds other tokens than when {checkpoint} was saved; its losses do not continue")
                continue
            if name not in now:
                what = f"{own} was a training set when {checkpoint} was saved, and is not one now"
            elif name not in recorded:
                what = f"{own} was not a training set when {checkpoint} was saved"
            else:
                what = f"{own} holds other tokens than when {checkpoint} was saved"
            lines.append(
                f"data.train: {what}; the run goes on at the same count of samples, in the sets as they are now"
            )
        return lines

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
    tokenizer = configured_tokenizer(given)
    name = given.path or given.type
    given_sets = (
        config.data.train if isinstance(config.data.train, list) else [WeightedSet(path=config.data.train, weight=1.0)]
    )
    train = [WeightedDataset(IndexedDataset(one.path), one.weight) for one in given_sets]
    validation = {}
    for set_name, prefix in validation_sets(config).items():
        with _named_in_errors(set_name):
            validation[set_name] = IndexedDataset(prefix)
    if (
        tokenizer.vocab_size > config.model.vocab_size
    ):  # fewer are allowed: imported models have rows that no token uses
        raise DataError(
            f"tokenizer {name}: has {tokenizer.vocab_size} pieces, model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size}"
        )
    for one in train:
        _check_tokenizer(one.dataset, tokenizer, name)
    BlendOrder(train, config.data.seq_length, config.data.shuffle_seed)
    for set_name, dataset in validation.items():
        with _named_in_errors(set_name):
            _check_tokenizer(dataset, tokenizer, name)
            if dataset.num_tokens < 2:
                raise DataError(f"{dataset.prefix}: holds {dataset.num_tokens} tokens, nothing to validate on")
    return RunData(
        train=train,
        validation=validation,
        eod_id=tokenizer.eod_id,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        tokenizer_path=name,
    )


@contextmanager
def _named_in_errors(set_name: str) -> Iterator[None]:
    """An error about a named validation set begins with its key: its prefix may be one of many."""
    try:
        yield
    except DataError as error:
        if not set_name:
            raise
        raise DataError(f"data.validation.{set_name}: {error}") from None


def _check_tokenizer(dataset: IndexedDataset, tokenizer: Tokenizer, name: str) -> None:
    """Raise DataError unless the set was made with this tokenizer. name: what messages call it."""
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
