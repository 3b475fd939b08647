"""The model's dense weights as safetensors, one file a model-parallel rank, readable at any other size.

What training needs beyond them (master weights, moments) is in the engine's own files; generation and conversion read
only these.
"""

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from overtok_megatron.checkpoint.writing import save_tensors
from overtok_megatron.errors import CheckpointError
from overtok_megatron.parallel.splits import ParameterSplit

Splits = tuple[ParameterSplit, ...]
FOLDER = "dense"


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
    return [f"{FOLDER}/model-{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)]


def save_dense(folder: Path, state: dict[str, torch.Tensor], splits: dict[str, int], rank: int, ranks: int) -> str:
    """Write one model-parallel rank's weights; `splits` names the dimension along which a weight is a shard."""
    name = dense_files(ranks)[rank]
    (folder / name).parent.mkdir(exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_tensors(tensors, folder / name, {"splits": json.dumps(splits)})
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


def read_parts(
    folder: Path, ranks: int, wanted: Mapping[str, Splits] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that `ranks` model-parallel ranks of any layout wrote, one after the other, each read just in part.

    wanted: the names, each with the splits whose part is read (none = all of it); None = all weights whole.
    Raises CheckpointError where one is missing.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(folder / name)) for name in dense_files(ranks)]
        holders: dict[str, list[Any]] = {}
        splits: dict[str, int] = {}
        for file in files:
            splits |= json.loads(file.metadata()["splits"])
            for key in file.keys():  # noqa: SIM118  # no mapping
                holders.setdefault(key, []).append(file)
        for name, own in (dict.fromkeys(holders, ()) if wanted is None else wanted).items():
            if name not in holders:
                raise CheckpointError(f"{folder}: holds no {name}; written by another version?")
            slices = [file.get_slice(name) for file in holders[name]]
            yield name, _part(slices if name in splits else slices[:1], splits.get(name, 0), own)


def _part(slices: list[Any], dim: int, splits: Splits) -> torch.Tensor:
    """A weight cut into `slices` along `dim`: of it the part of `splits`."""
    found, begin = [], 0
    for part in slices:
        ranges = [(0, size) for size in part.get_shape()]
        end = begin + ranges[dim][1]
        ranges[dim] = (begin, end)
        for split in splits:
            low, high = ranges[split.dim]
            ranges[split.dim] = (max(low, split.start), min(high, split.stop))
        low, high = ranges[dim]
        ranges[dim] = (low - begin, high - begin)
        if low < high:
            found.append(part[tuple(slice(*own) for own in ranges)])
        begin = end
    return found[0] if len(found) == 1 else torch.cat(found, dim=dim)
