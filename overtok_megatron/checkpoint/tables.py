"""Table rows as safetensors files by global row range: written by any number of ranks, read by any other number.

A file `tables/rows-<start>-<stop>.safetensors` holds rows [start, stop) of `weight`, `touched` and every optimizer
state. Its metadata states the range and the optimizer's step count.
"""

from pathlib import Path

from safetensors.torch import save_file

from overtok_megatron.checkpoint.dense import open_tensors
from overtok_megatron.checkpoint.store import sync
from overtok_megatron.errors import CheckpointError
from overtok_megatron.ngram.embedding import OverTables

FOLDER = "tables"
_FILE_BYTES = 1 << 29  # rows are written in files of about this size, which bounds the memory of a save


def save_tables(folder: Path, tables: OverTables) -> list[str]:
    """Write this rank's rows below `folder`; returns the file names relative to it. Needs no other rank."""
    (folder / FOLDER).mkdir(exist_ok=True)
    shard, optimizer = tables.shard, tables.optimizer
    columns = {"weight": shard.weight, "touched": shard.touched, **optimizer.state}
    row_bytes = sum(tensor[:1].nbytes for tensor in columns.values()) if shard.num_rows else 1
    step = max(1, _FILE_BYTES // row_bytes)
    names = []
    for begin in range(0, shard.num_rows, step):
        end = min(begin + step, shard.num_rows)
        name = f"{FOLDER}/rows-{shard.start + begin:012d}-{shard.start + end:012d}.safetensors"
        metadata = {"start": str(shard.start + begin), "stop": str(shard.start + end), "steps": str(optimizer.steps)}
        save_file({key: tensor[begin:end].cpu() for key, tensor in columns.items()}, folder / name, metadata)
        sync(folder / name)
        names.append(name)
    return names


def load_tables(folder: Path, tables: OverTables, *, with_optimizer: bool) -> None:
    """Fill this rank's rows from whichever files hold them.

    Raises CheckpointError where rows are missing or of another width, the optimizer's state is another one, or a file is
    damaged.
    """
    shard, optimizer = tables.shard, tables.optimizer
    columns = {"weight": shard.weight, "touched": shard.touched}
    if with_optimizer:
        columns |= optimizer.state
    filled = 0
    for path in sorted((folder / FOLDER).glob("rows-*.safetensors")):
        with open_tensors(path) as file:
            metadata = file.metadata()
            start, stop = int(metadata["start"]), int(metadata["stop"])
            begin, end = max(start, shard.start), min(stop, shard.stop)
            if begin >= end:
                continue
            missing = sorted(columns.keys() - set(file.keys()))
            if missing:
                raise CheckpointError(
                    f"{path}: holds no {missing[0]}; over_encoding.optimizer differs from the run that wrote it"
                )
            for key, target in columns.items():
                values = file.get_slice(key)[begin - start : end - start]
                place = target[begin - shard.start : end - shard.start]
                if values.shape != place.shape:
                    raise CheckpointError(
                        f"{path}: {key} has rows of shape {list(values.shape[1:])}, this model needs "
                        f"{list(place.shape[1:])}"
                    )
                place.copy_(values)
            optimizer.steps = int(metadata["steps"])
            filled += end - begin
    if filled != shard.num_rows:
        raise CheckpointError(
            f"{folder / FOLDER}: holds {filled} of the rows {shard.start} to {shard.stop}; the "
            "checkpoint is of a model with other tables, or damaged"
        )
