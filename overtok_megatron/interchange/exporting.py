"""A checkpoint becomes a Hugging Face folder: weights in shards, configuration, tokenizer, model card.

Plain models become their family's standard class; over-encoded ones a class of the modelling file that is copied beside the
weights, with the rows of the n-gram tables in files of their own. Weights are read and written one after the other.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from overtok_megatron.checkpoint.dense import read_parts
from overtok_megatron.checkpoint.store import Manifest, verify_checkpoint
from overtok_megatron.checkpoint.weights_only import read_rows, weight_shapes
from overtok_megatron.checkpoint.writing import save_tensors
from overtok_megatron.config.derived import has_word_embedding, hash_base, later_losses, without_later_heads
from overtok_megatron.config.moved_runs import run_of
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.tokenizers.kept import find_tokenizer
from overtok_megatron.errors import CheckpointError
from overtok_megatron.files import refuse_used_folder, whole_folder
from overtok_megatron.interchange.families import (
    FAMILIES,
    family_of,
    hugging_face_values,
    releases_of,
    require_transformers,
)
from overtok_megatron.interchange.model_card import model_card
from overtok_megatron.interchange.rotary_form import release_4_values
from overtok_megatron.interchange.tensor_files import write_shards
from overtok_megatron.interchange.tokenizer_files import write_tokenizer
from overtok_megatron.interchange.weight_names import WORD, to_theirs
from overtok_megatron.kernels.rows import SCATTER, STRIPES
from overtok_megatron.ngram.building import row_space

TABLES_INDEX = "tables.index.json"
MODELING = "modeling_overtok.py"
_PREFIX = "embedding."  # of our names of the over-encoder's weights, which the modelling file's names lack
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportOptions:
    """dtype: of the dense weights, None = as they are. max_shard_bytes: per file. tokenizer: its path, None = look for it."""

    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    tokenizer: Path | None = None


def export_checkpoint(source: Path, output: Path, options: ExportOptions) -> list[str]:
    """Write the checkpoint folder `source` as the Hugging Face folder `output`; returns notes for the user.

    Raises CheckpointError where `source` is damaged, no family computes its model, or `output` cannot be written, OutputError
    where `output` holds files; then nothing is left. Memory: one shard, or one file of rows.
    """
    manifest = verify_checkpoint(source)
    config = RunConfig.model_validate(manifest.config)
    section = find_tokenizer(config, run_of(source), manifest.tokenizer_fingerprint, options.tokenizer)
    heads = sorted(later_losses(config))
    config = without_later_heads(config.model_copy(update={"tokenizer": section}))
    values = config_values(config, manifest.eod_id)
    refuse_used_folder(output)
    try:
        with whole_folder(output) as aside:
            export = _Export(
                source=source, folder=aside, manifest=manifest, config=config, options=options, left_out=heads
            )
            return export.write(values)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output}: cannot be written ({' '.join(str(error).split())})") from None


@dataclass(frozen=True, kw_only=True)
class _Export:
    """One export of the checkpoint folder `source` into `folder`.

    config: the run's, with the tokenizer as it lies now, and without heads for later tokens. left_out: the names of their
    losses.
    """

    source: Path
    folder: Path
    manifest: Manifest
    config: RunConfig
    options: ExportOptions
    left_out: list[str]

    def write(self, values: dict[str, Any]) -> list[str]:
        """Write all files; returns notes for the user. values: config.json but for the dtype."""
        config, eod_id = self.config, self.manifest.eod_id
        over = config.over_encoding.enabled
        size, dtype = self._write_dense()
        if over:
            size += self._write_rows()
            shutil.copyfile(Path(__file__).with_name(MODELING), self.folder / MODELING)
        values = {**values, "dtype": str(dtype).removeprefix("torch.")}
        _write_json(self.folder / "config.json", values)
        generation = {"_from_model_config": False, "do_sample": False, "eos_token_id": eod_id, "pad_token_id": eod_id}
        _write_json(self.folder / "generation_config.json", generation)
        notes = write_tokenizer(config, self.folder, eod_id)
        if config.data.document_attention == "within":
            notes.append(
                "it was trained with attention within documents, but in transformers it attends across end-of-document tokens "
                "as well: logits are the same on text without any inside; give it one document at a time"
            )
        if not has_word_embedding(config.over_encoding):
            notes.append(
                "its input is n-grams alone: model.embed_tokens.weight is zero, and must not be trained (requires_grad=False)"
            )
        if self.left_out:
            notes.append(
                f"heads for later tokens are left out ({', '.join(self.left_out)}): this folder has the main model"
            )
        card = model_card(config, self.manifest, self.source, size=size, values=values, notes=notes)
        (self.folder / "README.md").write_text(card, encoding="utf-8")
        return notes

    def _write_dense(self) -> tuple[int, torch.dtype]:
        """(bytes of the dense weights, their largest dtype)."""
        dtypes: set[torch.dtype] = set()

        def noted(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                dtypes.add(weight.dtype)
                yield name, weight

        # transformers splits and joins experts only for its own families
        fused = self.config.over_encoding.enabled
        weights = noted(to_theirs(self.config.model, self._dense_weights(), fused=fused))
        size = write_shards(self.folder, weights, self.options.max_shard_bytes)
        return size, max(dtypes, key=lambda dtype: dtype.itemsize)

    def _dense_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Our weights in the model's order and the wanted dtype; those of the over-encoder by the modelling file's names.

        The families' classes always have a word embedding; that of a model without one is zero there.
        """
        wanted = dict.fromkeys(weight_shapes(self.config), ())
        lacks_word = not has_word_embedding(self.config.over_encoding)
        for name, weight in read_parts(self.source, self.manifest.layout.model_parallel_ranks, wanted):
            own = weight if self.options.dtype is None else weight.to(DTYPES[self.options.dtype])
            if lacks_word:
                model, lacks_word = self.config.model, False
                yield WORD, torch.zeros(model.vocab_size, model.hidden_size, dtype=own.dtype)
            yield (name.removeprefix(_PREFIX) if name.startswith(f"{_PREFIX}over_encoding.") else name), own

    def _write_rows(self) -> int:
        """Write the rows as they are stored, in files of at most max_shard_bytes, and their index; returns their bytes."""
        files: list[tuple[str, int, int]] = []
        total = 0
        for file_start, columns in read_rows(self.source):
            num_rows = columns["weight"].shape[0]
            row_bytes = sum(column[:1].nbytes for column in columns.values())
            step = max(1, self.options.max_shard_bytes // row_bytes)
            for first in range(0, num_rows, step):
                part = {name: column[first : first + step].clone() for name, column in columns.items()}
                start, stop = file_start + first, file_start + min(first + step, num_rows)
                name = f"tables-{len(files) + 1:05d}.safetensors"
                save_tensors(part, self.folder / name, {"format": "pt", "start": str(start), "stop": str(stop)})
                files.append((name, start, stop))
                total += sum(column.nbytes for column in part.values())
        _write_json(self.folder / TABLES_INDEX, {"files": files})
        return total


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def config_values(config: RunConfig, eod_id: int) -> dict[str, Any]:
    """The content of config.json but for the dtype. Raises CheckpointError where no family computes the model."""
    transformers = require_transformers()
    family = family_of(config.model)
    name = FAMILIES[family]
    # no pad_token_id: a torch embedding takes no gradient for it; generation_config.json has one
    own = {"bos_token_id": None, "eos_token_id": eod_id, "pad_token_id": None}
    logging.getLogger("transformers").setLevel(logging.ERROR)
    made = transformers.CONFIG_MAPPING[family](**hugging_face_values(config.model, config.data.seq_length), **own)
    values: dict[str, Any] = made.to_dict() | release_4_values(config.model, family)
    if not config.over_encoding.enabled:
        return {**values, "architectures": [f"{name}ForCausalLM"]}
    module = MODELING.removesuffix(".py")
    return {
        **values,
        "model_type": f"overtok_{family}",
        "architectures": [f"Overtok{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.Overtok{name}Config",
            "AutoModelForCausalLM": f"{module}.Overtok{name}ForCausalLM",
        },
        "transformers_releases": releases_of(config.model, fused=True),  # what the modelling file refuses others by
        "table_storage": "device",
        "over_encoding": encoder_settings(config, eod_id),
        "overtok": {  # what `overtok import` reads
            "model": config.model.model_dump(mode="json"),
            "over_encoding": config.over_encoding.model_dump(mode="json"),
            "tokenizer": {"type": config.tokenizer.type, "eod_token": config.tokenizer.eod_token},
            "precision": config.training.precision,
        },
    }


def encoder_settings(config: RunConfig, eod_id: int) -> dict[str, Any]:
    """What the modelling file needs to find rows: explained there."""
    over, space = config.over_encoding, row_space(config.model, config.over_encoding)
    prefix = f"{_PREFIX}over_encoding."
    projections = {
        name.removeprefix(prefix): shape[1] // space.width
        for name, shape in weight_shapes(config).items()
        if name.startswith(prefix)
    }
    return {
        "orders": list(space.orders),
        "sizes": list(space.sizes),
        "row_width": space.width,
        "projections": projections,
        "combine": over.combine,
        "hash_base": hash_base(config),
        "pad_id": over.pad_id,
        "boundary": over.boundary,
        "eod_id": eod_id,
        "stripes": STRIPES,
        "scatter": SCATTER,
    }
