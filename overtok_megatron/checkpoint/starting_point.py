"""The checkpoint from which a run starts: its own latest one, which it continues, or another one, whose weights it takes."""

from dataclasses import dataclass
from pathlib import Path

from overtok_megatron.checkpoint.changes import check_continuable, check_same_model
from overtok_megatron.checkpoint.layout import LayoutKind
from overtok_megatron.checkpoint.store import CheckpointStore, find_checkpoint, read_manifest
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import CheckpointError


@dataclass(frozen=True)
class StartingPoint:
    """A complete checkpoint from which a run starts: at step 0 with its weights where `fresh`, else at its step."""

    path: Path
    fresh: bool


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
        check_same_model(values, read_manifest(path), path, "start from another one")
        return StartingPoint(path, fresh=True)
    except CheckpointError as error:
        raise CheckpointError(f"training.initial_checkpoint: {error}") from None
