"""DeepSpeed's checkpoint files: written so that a failure is known on all ranks, and read without executing what they hold."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from overtok_megatron.checkpoint.deepspeed_state import DEEPSPEED_FOLDER
from overtok_megatron.errors import CheckpointError
from overtok_megatron.training.agreement import WRITE_ERRORS, reason

# Classes that DeepSpeed pickles into its checkpoints and that hold plain numbers only.
_PLAIN_CLASSES: list[Any] = [LossScaler, ZeroStageEnum, fragment_address, np.dtype, np.ndarray]


def load_deepspeed_file(path: str, map_location: Any = "cpu") -> Any:
    """The content of one of DeepSpeed's files; nothing in the file is executed."""
    with torch.serialization.safe_globals(_PLAIN_CLASSES):
        return torch.load(path, map_location=map_location, weights_only=True)


def dense_bytes(deepspeed_engine: Any) -> int:
    """Bytes of this tensor-parallel rank's dense weights, whole also under ZeRO 3."""
    parameters = deepspeed_engine.module.parameters()
    return sum(getattr(own, "ds_numel", own.numel()) * own.element_size() for own in parameters)


def deepspeed_bytes(deepspeed_engine: Any, optimizer: torch.optim.Optimizer, *, first_replica: bool) -> int:
    """Bytes of the tensors in the files that this rank writes for DeepSpeed, once a step has been taken.

    optimizer: the torch optimizer inside DeepSpeed's. first_replica: whether this rank is the first with its weights.
    """
    stage = deepspeed_engine.zero_optimization_stage()
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim > 0
    )
    # master weights are as wide as one of the two moments; without DeepSpeed's optimizer the weights themselves are the master
    state = moments if deepspeed_engine.optimizer is optimizer else moments * 3 // 2
    weights = dense_bytes(deepspeed_engine) if first_replica and stage < 3 else 0
    return weights + (state if stage > 0 or first_replica else 0)


class _NotedFiles:
    """Stands in for DeepSpeed's checkpoint engine, which writes and reads single files.

    A failed write is remembered in `failure` instead of raised, because the other ranks are about to enter a barrier. The
    files that this rank wrote are remembered in `written`.
    """

    def __init__(self, original: Any) -> None:
        self._original = original
        self.failure: str | None = None
        self.written: list[Path] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            torch.save(state_dict, path)
            self.written.append(Path(path))
        except WRITE_ERRORS as error:
            self.failure = self.failure or f"{path}: {reason(error)}"

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_deepspeed_file(path, map_location)


class DeepSpeedFiles:
    """Saves and loads DeepSpeed's own files of one engine, in the folder DEEPSPEED_FOLDER of a checkpoint."""

    def __init__(self, deepspeed_engine: Any) -> None:
        self._deepspeed_engine = deepspeed_engine
        self._files = deepspeed_engine.checkpoint_engine = _NotedFiles(deepspeed_engine.checkpoint_engine)

    def save(self, checkpoint: Path, client_state: dict[str, Any]) -> tuple[list[Path], str | None]:
        """Write the files below `checkpoint`; all ranks must call this. Returns what this rank wrote, and why it failed.

        The files may not be on the disk yet: the caller syncs them. Waits until the device's values were copied and written;
        DeepSpeed hands over tensors that the next step changes, and a copy would double the memory of the optimizer's state.
        """
        files = self._files
        files.failure, files.written = None, []
        try:
            self._deepspeed_engine.save_checkpoint(
                str(checkpoint), tag=DEEPSPEED_FOLDER, client_state=client_state, save_latest=False
            )
        except WRITE_ERRORS as error:  # from what DeepSpeed writes beside its checkpoint engine
            files.failure = files.failure or reason(error)
        return files.written, files.failure

    def load(self, checkpoint: Path) -> None:
        """Load the files below `checkpoint`, on the layout that wrote them. Raises CheckpointError where there are none."""
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints names of its own methods
            loaded, _ = self._deepspeed_engine.load_checkpoint(str(checkpoint), tag=DEEPSPEED_FOLDER)
        if loaded is None:
            raise CheckpointError(f"{checkpoint / DEEPSPEED_FOLDER}: DeepSpeed found no state to load")
