"""The model's dense weights as safetensors, one file a tensor-parallel rank, readable at any other size.

What training needs beyond them (master weights, moments) is in the engine's own files; generation and conversion read
only these.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from overtok_megatron.checkpoint.store import sync


def dense_files(tensor_ranks: int) -> list[str]:
    """Names of the dense weights' files, one a tensor-parallel rank."""
    return [f"dense/model-{rank:05d}-of-{tensor_ranks:05d}.safetensors" for rank in range(tensor_ranks)]


def save_dense(folder: Path, state: dict[str, torch.Tensor], splits: dict[str, int], rank: int, ranks: int) -> str:
    """Write one tensor-parallel rank's weights; `splits` names the dimension along which a weight is a shard."""
    name = dense_files(ranks)[rank]
    (folder / name).parent.mkdir(exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, folder / name, {"splits": json.dumps(splits)})
    sync(folder / name)
    return name


def load_dense(folder: Path, tensor_ranks: int) -> dict[str, torch.Tensor]:
    """The full dense weights of a checkpoint, whatever tensor-parallel size wrote them."""
    parts: dict[str, list[torch.Tensor]] = {}
    splits: dict[str, int] = {}
    for name in dense_files(tensor_ranks):
        with safe_open(folder / name, framework="pt") as file:
            splits = json.loads(file.metadata()["splits"])
            for key in file.keys():  # noqa: SIM118  # a safetensors file is no mapping
                parts.setdefault(key, []).append(file.get_tensor(key))
    return {key: torch.cat(tensors, dim=splits[key]) if key in splits else tensors[0] for key, tensors in parts.items()}
