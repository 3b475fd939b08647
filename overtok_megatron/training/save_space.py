"""Whether a save fits on the disk, found out before it begins: a disk that fills up in the middle of one costs minutes.

The bytes are counted from the tensors that will be written, and never too high: what is small (names, metadata), and rows of
an incremental save, whose number nobody knows before, are left out. A save that passes may still meet a full disk, or a quota
that the file system does not tell, and then ends as any failed save does.
"""

import os
import socket
from pathlib import Path

from overtok_megatron.checkpoint.tables import TableWriter
from overtok_megatron.errors import CheckpointError
from overtok_megatron.files import nearest_folder
from overtok_megatron.training.deepspeed.checkpoint_files import deepspeed_bytes, dense_bytes
from overtok_megatron.training.engine import TrainingEngine

# What stands after a failed save, and what to do about it.
MAKE_ROOM = "earlier checkpoints are intact: make room, and the same command goes on from the latest one"


def bytes_to_write(engine: TrainingEngine, writer: TableWriter | None) -> int:
    """At least how many bytes this rank writes in the next save. writer: of its tables, if there are any."""
    grid = engine.grid
    first_replica = grid.coordinate("data") == grid.coordinate("context") == 0
    tables = 0 if writer is None else writer.bytes_of_next_save()
    own = dense_bytes(engine.deepspeed_engine) if first_replica else 0
    return tables + own + deepspeed_bytes(engine.deepspeed_engine, engine.optimizer, first_replica=first_replica)


def free_bytes(folder: Path) -> int | None:
    """What the file system of a folder, or of its nearest parent, has for this user; None where it does not tell."""
    try:
        found = os.statvfs(nearest_folder(folder))
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def check_space(engine: TrainingEngine, folder: Path, step: int, needed: int) -> None:
    """Raise CheckpointError on all ranks, which must all call this, where the save of `step` below `folder` cannot fit.

    needed: bytes that this rank writes. All ranks write into one file system, of which each host may know another free space:
    the smallest counts.
    """
    found = engine.grid.gather_objects((needed, free_bytes(folder), socket.gethostname()))
    total = sum(own for own, _, _ in found)
    told = [(free, rank, host) for rank, (_, free, host) in enumerate(found) if free is not None]
    if told and total > min(told)[0]:
        free, rank, host = min(told)
        raise CheckpointError(
            f"could not save step {step}: {folder}: {total / 1e9:.3f} GB are to be written and {free / 1e9:.3f} GB are free on "
            f"{host} (rank {rank}); {MAKE_ROOM}"
        )
