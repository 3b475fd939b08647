"""The model's dense weights as safetensors, one file a model-parallel rank, readable at any other size.

What training needs beyond them (master weights, moments) is in the engine's own files; generation and conversion read
only these.
"""

import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from overtok_megatron.checkpoint.store import sync
from overtok_megatron.errors import CheckpointError


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file of a checkpoint for reading. Raises CheckpointError where it is missing, damaged or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{path}: unreadable ({why}); the file is damaged or not one of a checkpoint") from None


def dense_files(ranks: int) -> list[str]:
    """Names of the dense weights' files, one a model-parallel rank: pipeline stages in order, each with its tensor ranks."""
    return [f"dense/model-{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)]


def save_dense(folder: Path, state: dict[str, torch.Tensor], splits: dict[str, int], rank: int, ranks: int) -> str:
    """Write one model-parallel rank's weights; `splits` names the dimension along which a weight is a shard."""
    name = dense_files(ranks)[rank]
    (folder / name).parent.mkdir(exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, folder / name, {"splits": json.dumps(splits)})
    sync(folder / name)
    return name


def read_weights(path: Path, wanted: Container[str] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The weights of one file as they are (of them those `wanted`), and along which dimension each is a shard.

    Raises CheckpointError.
    """
    with open_tensors(path) as file:
        splits: dict[str, int] = json.loads(file.metadata()["splits"])
        names = [key for key in file.keys() if wanted is None or key in wanted]  # noqa: SIM118  # no mapping
        return {key: file.get_tensor(key) for key in names}, splits


def load_dense(folder: Path, ranks: int) -> dict[str, torch.Tensor]:
    """The full dense weights that `ranks` model-parallel ranks of any layout wrote. Raises CheckpointError."""
    parts: dict[str, list[torch.Tensor]] = {}
    splits: dict[str, int] = {}
    for name in dense_files(ranks):
        weights, own_splits = read_weights(folder / name)
        splits |= own_splits
        for key, weight in weights.items():
            parts.setdefault(key, []).append(weight)
    return {key: torch.cat(tensors, dim=splits[key]) if key in splits else tensors[0] for key, tensors in parts.items()}
