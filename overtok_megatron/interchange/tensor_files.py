"""Tensors in one or several safetensors files with Hugging Face's index: read one by one, written file by file."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.checkpoint.dense import open_tensors
from overtok_megatron.checkpoint.writing import save_tensors
from overtok_megatron.errors import CheckpointError
from overtok_megatron.files import read_text

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class TensorFiles:
    """The weights of a Hugging Face folder, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where the folder has no safetensors files, or not those that its index names."""
        self._folder = folder
        self._files: dict[str, str] = {}
        index = folder / _INDEX
        if index.is_file():
            self._files = self._read_index(index)
        elif (folder / _SINGLE).is_file():
            with open_tensors(folder / _SINGLE) as file:
                self._files = dict.fromkeys(file.keys(), _SINGLE)
        else:
            raise CheckpointError(
                f"{folder}: holds neither {_SINGLE} nor {_INDEX}; name a folder that save_pretrained wrote"
            )

    def _read_index(self, index: Path) -> dict[str, str]:
        try:
            files: dict[str, str] = json.loads(read_text(index))["weight_map"]
            names = set(files.values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: unreadable ({error})") from None
        for name in sorted(names):
            if Path(name).name != name or not (self._folder / name).is_file():
                raise CheckpointError(f"{index}: names {name}, which is not in the folder; copy all files of the model")
        return files

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> Tensor:
        """Raises CheckpointError where the file is damaged, or holds no such tensor."""
        path = self._folder / self._files[name]
        with open_tensors(path) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], most_bytes: int) -> int:
    """Write tensors in files of at most `most_bytes` (one tensor may be larger), with an index where there are several files.

    Returns the bytes of all tensors. Memory: one file. The files get their numbers once it is known how many there are.
    """
    pieces: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _gather(tensors, most_bytes):
        path = folder / f"piece-{len(pieces)}.safetensors"
        save_tensors(shard, path, {"format": "pt"})
        pieces.append((path, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(pieces):
        file = _SINGLE if len(pieces) == 1 else f"model-{number + 1:05d}-of-{len(pieces):05d}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(pieces) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return total


def _gather(tensors: Iterable[tuple[str, Tensor]], most_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Tensors by name for one file after the other. The dictionary is emptied after use."""
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if gathered and sum(own.nbytes for own in gathered.values()) + tensor.nbytes > most_bytes:
            yield gathered
            gathered.clear()
        gathered[name] = tensor.clone(memory_format=torch.contiguous_format)  # views of one tensor would be refused
    if gathered:
        yield gathered
