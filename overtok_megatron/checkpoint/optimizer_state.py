"""The optimizer state of dense parameters in a checkpoint of any layout, read by parameter name, each rank its own part.

A checkpoint that ranks wrote holds it in DeepSpeed's files (deepspeed_state.py). One that was reshaped holds one file per
pipeline stage with whole parameters, `dense/optimizer-<stage>.safetensors`: tensors `<parameter>/<name>` for each
of STATE_NAMES, and in the metadata the steps of each parameter.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from overtok_megatron.checkpoint.deepspeed_state import (
    DEEPSPEED_FOLDER,
    STATE_NAMES,
    LoadFile,
    ParameterState,
    read_deepspeed_state,
)
from overtok_megatron.checkpoint.dense import FOLDER, Splits, dense_files, open_tensors, read_weights
from overtok_megatron.checkpoint.layout import CheckpointLayout, LayoutKind
from overtok_megatron.checkpoint.writing import save_tensors
from overtok_megatron.errors import CheckpointError
from overtok_megatron.parallel.splits import own_part


def read_optimizer_states(
    folder: Path, layout: CheckpointLayout, wanted: Mapping[str, Splits], load_file: LoadFile
) -> Iterator[tuple[str, ParameterState]]:
    """The state of the `wanted` parameters of a checkpoint, each as the part that its splits name (none = all of it).

    load_file: reads one of DeepSpeed's files without executing what is in it. Raises CheckpointError where a parameter is
    missing. Memory: what the ranks of one pipeline stage held.
    """
    missing = set(wanted)
    for stage in range(layout.pipeline):
        if layout.kind is LayoutKind.WHOLE:
            states = _read_whole_state(folder, stage, wanted)
        else:
            states = _read_stage(folder, layout, stage, wanted, load_file)
        for name, state in states:
            yield name, state
            missing.discard(name)
    if missing:
        raise CheckpointError(f"{folder}: holds no {min(missing)}; written by another version?")


def stage_names(folder: Path, layout: CheckpointLayout, stage: int) -> list[str]:
    """Names of the parameters that a pipeline stage held."""
    name = dense_files(layout.model_parallel_ranks)[layout.file_number(stage, tensor_rank=0)]
    with open_tensors(folder / name) as file:
        return list(file.keys())


def _read_stage(
    folder: Path, layout: CheckpointLayout, stage: int, wanted: Mapping[str, Splits], load_file: LoadFile
) -> Iterator[tuple[str, ParameterState]]:
    """The state that the ranks of one pipeline stage wrote, tensor-parallel shards joined."""
    names, model_ranks = dense_files(layout.model_parallel_ranks), layout.file_numbers(stage)
    weights, split_dims = zip(*(read_weights(folder / names[rank], wanted) for rank in model_ranks), strict=True)
    if not weights[0]:
        return
    states = [
        dict(read_deepspeed_state(folder / DEEPSPEED_FOLDER, layout, rank, shards, load_file))
        for rank, shards in zip(model_ranks, weights, strict=True)
    ]
    for name in weights[0]:
        yield name, _join([state[name] for state in states], split_dims[0].get(name), wanted[name])


def _join(shards: list[ParameterState], dim: int | None, splits: Splits) -> ParameterState:
    """The part `splits` of a parameter whose shards lie along `dim`; dim None = every shard is the whole parameter."""
    values = {}
    for key, first in shards[0].values.items():
        whole = first if dim is None else torch.cat([shard.values[key] for shard in shards], dim=dim)
        values[key] = own_part(whole, splits)
    return ParameterState(values, shards[0].steps)


def _whole_state_file(stage: int) -> str:
    return f"{FOLDER}/optimizer-{stage:05d}.safetensors"


def write_whole_state(folder: Path, stage: int, states: dict[str, ParameterState]) -> str:
    """Write the whole state of a stage's parameters to a file of the checkpoint `folder`; returns the file's name."""
    name = _whole_state_file(stage)
    tensors = {
        f"{parameter}/{key}": value.contiguous()
        for parameter, state in states.items()
        for key, value in state.values.items()
    }
    steps = json.dumps({parameter: state.steps for parameter, state in states.items()})
    (folder / name).parent.mkdir(exist_ok=True)
    save_tensors(tensors, folder / name, {"steps": steps})
    return name


def _read_whole_state(folder: Path, stage: int, wanted: Mapping[str, Splits]) -> Iterator[tuple[str, ParameterState]]:
    with open_tensors(folder / _whole_state_file(stage)) as file:
        for name, steps in json.loads(file.metadata()["steps"]).items():
            if name not in wanted:
                continue
            values = {}
            for key in STATE_NAMES:
                stored = file.get_slice(f"{name}/{key}")
                ranges = [slice(None)] * len(stored.get_shape())
                for split in wanted[name]:
                    ranges[split.dim] = slice(split.start, split.stop)
                values[key] = stored[tuple(ranges)]
            yield name, ParameterState(values, steps)
