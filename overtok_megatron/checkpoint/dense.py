"""The model's dense weights as safetensors files, one per model-parallel rank, readable by any other number of ranks.

The optimizer state (master weights, moments) is read by optimizer_state.py. Generation and conversion read only
these files. Their metadata says along which dimension each weight is split over the tensor ranks.
"""

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overtok_megatron.checkpoint.writing import save_tensors
from overtok_megatron.errors import CheckpointError
from overtok_megatron.parallel.splits import ParameterSplit

Splits = tuple[ParameterSplit, ...]
FOLDER = "dense"


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file of a checkpoint for reading. Raises CheckpointError where it is missing, damaged or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{path}: unreadable ({why}); the file is damaged or not one of a checkpoint") from None


def dense_files(ranks: int) -> list[str]:
    """Names of the files of `ranks` model-parallel ranks: pipeline stages in order, each with its tensor ranks."""
    return [f"{FOLDER}/model-{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)]


def save_dense(folder: Path, weights: dict[str, Tensor], split_dims: dict[str, int], rank: int, ranks: int) -> str:
    """Write the weights of model-parallel rank `rank` of `ranks`; returns the file's name.

    split_dims: the dimension along which a weight is a shard; weights that are not in it are whole.
    """
    name = dense_files(ranks)[rank]
    (folder / name).parent.mkdir(exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    save_tensors(tensors, folder / name, {"splits": json.dumps(split_dims)})
    return name


def _read_split_dims(file: Any) -> dict[str, int]:
    """Along which dimension each weight of an open file is a shard."""
    found: dict[str, int] = json.loads(file.metadata()["splits"])
    return found


def read_weights(path: Path, wanted: Container[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(the `wanted` weights of one file as they were written, along which dimension each is a shard).

    Raises CheckpointError.
    """
    with open_tensors(path) as file:
        names = [key for key in file.keys() if key in wanted]  # noqa: SIM118  # not a mapping
        return {key: file.get_tensor(key) for key in names}, _read_split_dims(file)


def read_parts(folder: Path, ranks: int, wanted: Mapping[str, Splits] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint with `ranks` model-parallel ranks, one after the other, each read only in part.

    wanted: the names, each with the splits whose part is read (none = all of it); None = all weights, whole.
    Raises CheckpointError where a weight is missing.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(folder / name)) for name in dense_files(ranks)]
        holders: dict[str, list[Any]] = {}
        split_dims: dict[str, int] = {}
        for file in files:
            split_dims |= _read_split_dims(file)
            for key in file.keys():  # noqa: SIM118  # not a mapping
                holders.setdefault(key, []).append(file)
        for name, splits in (dict.fromkeys(holders, ()) if wanted is None else wanted).items():
            if name not in holders:
                raise CheckpointError(f"{folder}: holds no {name}; written by another version?")
            shards = [file.get_slice(name) for file in holders[name]]
            yield name, _read_part(shards if name in split_dims else shards[:1], split_dims.get(name, 0), splits)


def _read_part(shards: list[Any], dim: int, splits: Splits) -> Tensor:
    """The part `splits` of a weight whose stored `shards` lie one after the other along `dim`."""
    found, first = [], 0  # index along dim at which the next shard starts in the whole weight
    for shard in shards:
        ranges = [(0, size) for size in shard.get_shape()]
        stop = first + ranges[dim][1]
        ranges[dim] = (first, stop)
        for split in splits:
            low, high = ranges[split.dim]
            ranges[split.dim] = (max(low, split.start), min(high, split.stop))
        low, high = ranges[dim]
        ranges[dim] = (low - first, high - first)
        if low < high:
            found.append(shard[tuple(slice(*own) for own in ranges)])
        first = stop
    return found[0] if len(found) == 1 else torch.cat(found, dim=dim)
