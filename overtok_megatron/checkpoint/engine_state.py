"""The dense optimizer state in DeepSpeed's files, by parameter name, whatever ZeRO stage and pipeline wrote them.

Every rank of the layout that wrote them has its part; here the parts of one model-parallel rank become whole parameters of
that rank (master weight and both moments). What belongs to which file follows from DeepSpeed's own records in them.
Tensor-parallel shards are joined by the caller, who knows along which dimension.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.checkpoint.dense import Splits, dense_files, open_tensors, read_weights
from overtok_megatron.checkpoint.writing import save_tensors
from overtok_megatron.errors import CheckpointError
from overtok_megatron.parallel.splits import own_part

ORDER = "optimizer_parameters"  # names in the optimizer's order, beside the state of an engine without ZeRO
MOMENTS = ("exp_avg", "exp_avg_sq")
ENGINE_FOLDER = "engine"  # of DeepSpeed's files, in a checkpoint
WHOLE = -1  # in place of a ZeRO stage: the state of whole parameters, which no rank of an engine wrote
WEIGHTS_ONLY = -2  # in place of a ZeRO stage: whole parameters and rows, no optimizer state
Load = Callable[[str], Any]


@dataclass
class ParameterState:
    """float32 values by what they are: `master`, `exp_avg`, `exp_avg_sq`, all of one shape."""

    values: dict[str, Tensor]
    steps: int


def read_engine_state(
    folder: Path, load: Load, *, zero_stage: int, model_rank: int, data_ranks: int, weights: dict[str, Tensor]
) -> Iterator[tuple[str, ParameterState]]:
    """The state of those parameters of the model-parallel rank `model_rank` that `weights` holds as they were there.

    load: reads one file without executing what is in it. Raises CheckpointError where a parameter is incomplete.
    """
    if zero_stage == 0:
        yield from _read_plain(load(str(folder / f"mp_rank_{model_rank:02d}_model_states.pt")), weights)
        return
    files = [_zero_files(folder, rank, model_rank) for rank in range(data_ranks)]
    states = [load(str(optimizer))["optimizer_state_dict"] for optimizer, _ in files]
    if zero_stage == 3:
        groups = load(str(files[0][1]))["param_shapes"]
        pieces = [_pieces_of_stage_3(state, groups, data_ranks) for state in states]
    else:
        pieces = [_pieces(state) for state in states]
    steps = next(int(step) for _, _, step in _flat_groups(states[0], zero_stage))
    for name, weight in weights.items():
        parts = [own[name] for own in pieces if name in own]
        values = {}
        for key in ("master", *MOMENTS):
            flat = torch.cat([part[key] for part in parts]) if parts else torch.empty(0)
            if flat.numel() < weight.numel():
                raise CheckpointError(
                    f"{folder}: holds {flat.numel()} of the {weight.numel()} values of {name} ({key}); "
                    "the checkpoint is damaged"
                )
            values[key] = flat[: weight.numel()].float().view(weight.shape)
        yield name, ParameterState(values, steps)


def _zero_files(folder: Path, data_rank: int, model_rank: int) -> tuple[Path, Path]:
    """A rank's optimizer file (DeepSpeed puts `bf16_` before some) and its model file."""
    stem = f"zero_pp_rank_{data_rank}_mp_rank_{model_rank:02d}"
    plain, half = folder / f"{stem}_optim_states.pt", folder / f"bf16_{stem}_optim_states.pt"
    return (half if half.is_file() else plain), folder / f"{stem}_model_states.pt"


def _flat_groups(state: dict[str, Any], zero_stage: int) -> Iterator[tuple[Tensor, dict[str, Tensor], Any]]:
    """(flat master weights, flat moments, step) of each of a rank's groups."""
    stage_3 = zero_stage == 3
    masters = state["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"]
    base = state["optimizer_state_dict" if stage_3 else "base_optimizer_state"]
    for index, master in enumerate(masters):
        moments = base["state"][index]
        step = moments["step"] if "step" in moments else base["param_groups"][0]["step"]  # apex keeps it in the group
        yield master, {key: moments[key] for key in MOMENTS}, step


def _pieces(state: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """A rank's fragments by parameter, from where DeepSpeed says that they lie in the flat groups; empty ranks have none."""
    found = {}
    for (master, moments, _), places in zip(_flat_groups(state, 1), state["param_slice_mappings"], strict=True):
        for name, place in places.items():
            flat = {"master": master, **moments}
            found[name] = {key: value.narrow(0, place.start, place.numel) for key, value in flat.items()}
    return found


def _pieces_of_stage_3(
    state: dict[str, Any], groups: list[dict[str, Any]], data_ranks: int
) -> dict[str, dict[str, Tensor]]:
    """Stage 3 cuts every parameter into equal parts, padded, and lays a rank's parts end to end."""
    flats = list(_flat_groups(state, 3))
    whole = {"master": torch.cat([master.flatten() for master, _, _ in flats])}
    for key in MOMENTS:
        whole[key] = torch.cat([moments[key].flatten() for _, moments, _ in flats])
    found, begin = {}, 0
    for shapes in groups:
        for name, shape in shapes.items():
            size = -(-math.prod(shape) // data_ranks)
            found[name] = {key: value.narrow(0, begin, size) for key, value in whole.items()}
            begin += size
    return found


def _read_plain(content: dict[str, Any], weights: dict[str, Tensor]) -> Iterator[tuple[str, ParameterState]]:
    """Without ZeRO the torch optimizer's state is whole in one file, with float32 masters beside it for bf16."""
    state, masters = content["optimizer"], None
    if "fp32_groups" in state:
        masters = [tensor for group in state["fp32_groups"] for tensor in group]
        state = state["optimizer_state_dict"]
    for index, name in enumerate(content[ORDER]):
        if name not in weights:
            continue
        own = state["state"][index]
        step = own["step"] if "step" in own else state["param_groups"][0]["step"]
        values = {"master": weights[name] if masters is None else masters[index]}
        values |= {key: own[key] for key in MOMENTS}
        shape = weights[name].shape
        yield name, ParameterState({key: value.float().view(shape) for key, value in values.items()}, int(step))


def read_dense_states(
    folder: Path, layout: dict[str, int], wanted: Mapping[str, Splits], load: Load
) -> Iterator[tuple[str, ParameterState]]:
    """The state of the `wanted` parameters from a checkpoint of any layout, each as the part of its splits (none = all).

    Raises CheckpointError where one is missing. Memory: what one pipeline stage's ranks held, at a time.
    """
    missing = set(wanted)
    for stage in range(layout["pipeline_parallel_size"]):
        read = _read_whole if layout["zero_stage"] == WHOLE else _read_stage
        for name, state in read(folder, stage, layout, wanted, load):
            yield name, state
            missing.discard(name)
    if missing:
        raise CheckpointError(f"{folder}: holds no {min(missing)}; written by another version?")


def stage_names(folder: Path, stage: int, layout: dict[str, int]) -> list[str]:
    """The parameters that a pipeline stage held."""
    first = stage * layout["tensor_parallel_size"]
    name = dense_files(layout["tensor_parallel_size"] * layout["pipeline_parallel_size"])[first]
    with open_tensors(folder / name) as file:
        return list(file.keys())


def _read_stage(
    folder: Path, stage: int, layout: dict[str, int], wanted: Mapping[str, Splits], load: Load
) -> Iterator[tuple[str, ParameterState]]:
    tensor_ranks = layout["tensor_parallel_size"]
    names = dense_files(tensor_ranks * layout["pipeline_parallel_size"])
    own = range(stage * tensor_ranks, (stage + 1) * tensor_ranks)
    weights, splits = zip(*(read_weights(folder / names[rank], wanted) for rank in own), strict=True)
    if not weights[0]:
        return
    data_ranks = layout["data_parallel_size"] * layout["context_parallel_size"]
    states = [
        dict(
            read_engine_state(
                folder / ENGINE_FOLDER,
                load,
                zero_stage=layout["zero_stage"],
                model_rank=rank,
                data_ranks=data_ranks,
                weights=held,
            )
        )
        for rank, held in zip(own, weights, strict=True)
    ]
    for name in weights[0]:
        yield name, _join([state[name] for state in states], splits[0].get(name), wanted[name])


def whole_file(stage: int) -> str:
    """Name of the file with the whole optimizer state of a stage's parameters, in a checkpoint written anew."""
    return f"dense/optimizer-{stage:05d}.safetensors"


def write_whole(folder: Path, stage: int, states: dict[str, ParameterState]) -> str:
    """Write the whole state of a stage's parameters; returns the file's name."""
    name = whole_file(stage)
    tensors = {
        f"{parameter}/{key}": value.contiguous()
        for parameter, state in states.items()
        for key, value in state.values.items()
    }
    steps = json.dumps({parameter: state.steps for parameter, state in states.items()})
    (folder / name).parent.mkdir(exist_ok=True)
    save_tensors(tensors, folder / name, {"steps": steps})
    return name


def _read_whole(
    folder: Path, stage: int, layout: dict[str, int], wanted: Mapping[str, Splits], load: Load
) -> Iterator[tuple[str, ParameterState]]:
    with open_tensors(folder / whole_file(stage)) as file:
        for name, steps in json.loads(file.metadata()["steps"]).items():
            if name not in wanted:
                continue
            values = {}
            for key in ("master", *MOMENTS):
                part = file.get_slice(f"{name}/{key}")
                ranges = [slice(None)] * len(part.get_shape())
                for split in wanted[name]:
                    ranges[split.dim] = slice(split.start, split.stop)
                values[key] = part[tuple(ranges)]
            yield name, ParameterState(values, steps)


def _join(parts: list[ParameterState], dim: int | None, splits: Splits) -> ParameterState:
    values = {}
    for key, first in parts[0].values.items():
        whole = first if dim is None else torch.cat([part.values[key] for part in parts], dim=dim)
        values[key] = own_part(whole, splits)
    return ParameterState(values, parts[0].steps)
