"""How DeepSpeed's checkpoint files reach the disk and come back: synced, and never executing what they hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from overtok_megatron.files import sync

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
READ_ERRORS = (OSError, SafetensorError)


def reason(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class EngineFiles:
    """Stands in for DeepSpeed's checkpoint engine: synced writes, reads that cannot execute what they read.

    A failed write is remembered in `failure` instead of raised, because the other ranks are about to enter a barrier. Files
    that this rank wrote are remembered in `written`: each rank hashes its own.
    """

    def __init__(self, original: Any, load: Callable[[str, Any], Any]) -> None:
        self._original = original
        self._load = load
        self.failure: str | None = None
        self.written: list[Path] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            torch.save(state_dict, path)
            sync(Path(path))
            self.written.append(Path(path))
        except WRITE_ERRORS as error:
            self.failure = self.failure or f"{path}: {reason(error)}"

    def load(self, path: str, map_location: Any = None) -> Any:
        return self._load(path, map_location)
