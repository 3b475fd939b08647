"""Rewrites a checkpoint without a layout: whole weights and optimizer state, tables with their increments merged.

Any layout loads it, each rank reading only its own part; resuming from a checkpoint of other ranks without this step works
too, but every rank then reads whole files.
"""

from dataclasses import replace
from pathlib import Path

from overtok_megatron.checkpoint.dense import Splits, read_parts, save_dense
from overtok_megatron.checkpoint.layout import CheckpointLayout, LayoutKind
from overtok_megatron.checkpoint.optimizer_state import read_optimizer_states, stage_names, write_whole_state
from overtok_megatron.checkpoint.store import CheckpointStore, Digest, Manifest, file_digest, verify_checkpoint
from overtok_megatron.checkpoint.tables import merged_rows, write_rows
from overtok_megatron.config.derived import is_trained
from overtok_megatron.errors import CheckpointError, OutputError
from overtok_megatron.kernels.dtypes import DTYPES
from overtok_megatron.run_lock import hold
from overtok_megatron.training.deepspeed.checkpoint_files import load_deepspeed_file


def reshape(source: Path, output: Path) -> Path:
    """Write the checkpoint folder `source` anew below the run folder `output` and make it the latest there.

    `output` may be the run that `source` belongs to: it is replaced when the new one is complete. Raises CheckpointError
    where `source` is damaged, or where another process writes into `output`; OutputError where `output` is another run with
    a checkpoint of this step. Memory: the weights and state of one pipeline stage, or one file of rows.
    """
    manifest = verify_checkpoint(source)
    if manifest.layout.kind is not LayoutKind.WRITTEN_BY_RANKS:
        raise CheckpointError(f"{source}: holds whole parameters already; any layout loads it as it is")
    with hold(output, "overtok checkpoint reshape"):
        return _write(source, manifest, CheckpointStore(output))


def _write(source: Path, manifest: Manifest, store: CheckpointStore) -> Path:
    there = store.final(manifest.step)
    if there.exists() and not there.samefile(source):  # of another run: it would be lost
        raise OutputError(f"{there}: is there already; remove it, or name another --output")
    store.clean()
    folder = store.start_save(manifest.step)
    stages = manifest.layout.pipeline
    dtype = DTYPES[manifest.config["training"]["precision"]]
    train_only = manifest.config["training"].get("train_only")  # younger than some checkpoints
    names: list[str] = []
    for stage in range(stages):
        every = stage_names(source, manifest.layout, stage)
        wanted: dict[str, Splits] = {name: () for name in every if is_trained(train_only, name)}
        states = dict(read_optimizer_states(source, manifest.layout, wanted, load_deepspeed_file))
        weights = {name: state.values["master"].to(dtype) for name, state in states.items()}
        frozen: dict[str, Splits] = {name: () for name in every if name not in wanted}
        if frozen:
            weights |= read_parts(source, manifest.layout.model_parallel_ranks, frozen)
        names += [save_dense(folder, weights, {}, stage, stages), write_whole_state(folder, stage, states)]
    files: dict[str, Digest] = {name: file_digest(folder / name) for name in names}
    for file, values, steps in merged_rows(source):
        files |= write_rows(folder, file, values, steps)
    layout = CheckpointLayout(pipeline=stages, kind=LayoutKind.WHOLE)
    return store.publish(replace(manifest, layout=layout, files=files))
