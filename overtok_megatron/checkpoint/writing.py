"""Writes tensors to a safetensors file; all parts of checkpoints and of exported models are written by it."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from overtok_megatron.files import follow_umask, sync

FILE_BYTES = 1 << 28  # weights and rows are written in files of about this size, which bounds the memory of a save


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write one file and sync it. Its mode follows the umask: the library makes files that only their owner reads (0600).

    Raises SafetensorError or OSError, as the library and the disk do.
    """
    save_file(dict(tensors), path, metadata)
    follow_umask(path)
    sync(path)
