"""The checkpoint from which a run starts: its own latest one, which it continues, or another run's.

Of another one it takes the weights, or everything (training.initial_state): the whole state, the step and the position in the
data, as if it were its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overtok_megatron.checkpoint.changes import check_continuable, check_same_model, check_same_state
from overtok_megatron.checkpoint.layout import LayoutKind
from overtok_megatron.checkpoint.store import CheckpointStore, Manifest, find_checkpoint, read_manifest
from overtok_megatron.config.derived import train_iters
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import CheckpointError


@dataclass(frozen=True)
class StartingPoint:
    """A complete checkpoint from which a run starts: at step 0 with its weights where `fresh`, else at its step.

    own: whether it is the run's own.
    """

    path: Path
    fresh: bool
    own: bool = True


def starting_point(config: RunConfig) -> StartingPoint | None:
    """The run's own latest checkpoint, or the one that training.initial_checkpoint names, or neither.

    Raises CheckpointError where the named checkpoint does not exist, or where the configuration differs from the checkpoint's
    in a key that cannot change.
    """
    own = CheckpointStore(Path(config.training.output_directory)).latest() if config.training.resume == "auto" else None
    values = config.model_dump(mode="json")
    if own is not None:
        manifest = read_manifest(own)
        fresh = manifest.layout.kind is LayoutKind.WEIGHTS_ONLY
        (check_same_model if fresh else check_continuable)(values, manifest, own)
        return StartingPoint(own, fresh)
    if config.training.initial_checkpoint is None:
        return None
    try:
        path = find_checkpoint(Path(config.training.initial_checkpoint))
        manifest, fresh = read_manifest(path), config.training.initial_state == "weights"
        if fresh:
            check_same_model(values, manifest, path, "start from another one")
        else:
            _check_branch(config, values, manifest, path)
        return StartingPoint(path, fresh, own=False)
    except CheckpointError as error:
        raise CheckpointError(f"training.initial_checkpoint: {error}") from None


def _check_branch(config: RunConfig, values: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """Raise CheckpointError where a new run of `config` cannot go on from everything that a checkpoint holds."""
    if manifest.layout.kind is LayoutKind.WEIGHTS_ONLY:
        raise CheckpointError(f"{path}: holds weights without optimizer state; set training.initial_state: weights")
    check_same_state(values, manifest, path)
    steps = train_iters(config)
    if manifest.step >= steps:
        raise CheckpointError(
            f"{path}: is of step {manifest.step}, and this run has {steps} steps, those before the checkpoint included; raise "
            "training.train_iters (or train_tokens), or set training.initial_state: weights"
        )
