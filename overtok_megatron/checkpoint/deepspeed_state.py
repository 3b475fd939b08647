"""The optimizer state of dense parameters in DeepSpeed's files, by parameter name, for every ZeRO stage.

Each rank of the layout that wrote the files has a part of the state. Here the parts of one model-parallel rank become the
whole parameters of that rank: master weight and both moments. Which part belongs to which parameter follows from DeepSpeed's
own records in the files. Shards of tensor-parallel ranks are joined in optimizer_state.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.checkpoint.layout import CheckpointLayout
from overtok_megatron.errors import CheckpointError

OPTIMIZER_PARAMETERS = "optimizer_parameters"  # key of the names in the optimizer's order, for files without ZeRO
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_NAMES = ("master", *MOMENTS)
DEEPSPEED_FOLDER = "engine"  # of a checkpoint, with DeepSpeed's files
LoadFile = Callable[[str], Any]
Fragments = dict[str, dict[str, Tensor]]  # one rank's flat part of each parameter's values: parameter -> name -> values


@dataclass
class ParameterState:
    """float32 values by name: `master`, `exp_avg`, `exp_avg_sq`, all of one shape; and the steps that the optimizer took."""

    values: dict[str, Tensor]
    steps: int


def read_deepspeed_state(
    folder: Path, layout: CheckpointLayout, model_rank: int, weights: dict[str, Tensor], load_file: LoadFile
) -> Iterator[tuple[str, ParameterState]]:
    """The state of those parameters of a model-parallel rank that `weights` holds, as that rank's weights were saved.

    folder: of DeepSpeed's files. load_file: reads one file without executing what is in it. Raises CheckpointError where a
    parameter is incomplete.
    """
    if layout.zero_stage == 0:
        yield from _read_without_zero(load_file(str(folder / f"mp_rank_{model_rank:02d}_model_states.pt")), weights)
        return
    ranks, steps = _read_zero_ranks(folder, layout, model_rank, load_file)
    for name, weight in weights.items():
        fragments = [rank[name] for rank in ranks if name in rank]
        values = {}
        for key in STATE_NAMES:
            flat = torch.cat([fragment[key] for fragment in fragments]) if fragments else torch.empty(0)
            if flat.numel() < weight.numel():
                raise CheckpointError(
                    f"{folder}: holds {flat.numel()} of the {weight.numel()} values of {name} ({key}); "
                    "the checkpoint is damaged"
                )
            values[key] = flat[: weight.numel()].float().view(weight.shape)  # ZeRO 3 pads the last rank's part
        yield name, ParameterState(values, steps)


def _read_without_zero(content: dict[str, Any], weights: dict[str, Tensor]) -> Iterator[tuple[str, ParameterState]]:
    """The state of a DeepSpeed engine without ZeRO: torch's, whole in one file, with float32 masters beside it for bf16."""
    state, masters = content["optimizer"], None
    if "fp32_groups" in state:
        masters = [tensor for group in state["fp32_groups"] for tensor in group]
        state = state["optimizer_state_dict"]
    for index, name in enumerate(content[OPTIMIZER_PARAMETERS]):
        if name not in weights:
            continue
        moments = state["state"][index]
        values = {"master": weights[name] if masters is None else masters[index]}
        values |= {key: moments[key] for key in MOMENTS}
        shape = weights[name].shape
        values = {key: value.float().view(shape) for key, value in values.items()}
        yield name, ParameterState(values, _steps_of(moments, state))


def _steps_of(moments: dict[str, Any], state: dict[str, Any]) -> int:
    """The steps beside a parameter's moments; apex keeps them in the parameter group instead."""
    return int(moments["step"] if "step" in moments else state["param_groups"][0]["step"])


def _read_zero_ranks(
    folder: Path, layout: CheckpointLayout, model_rank: int, load_file: LoadFile
) -> tuple[list[Fragments], int]:
    """(what each data rank holds of every parameter, steps that the optimizer took)."""
    files = [_zero_files(folder, rank, model_rank) for rank in range(layout.data_ranks)]
    states = [load_file(str(optimizer_file))["optimizer_state_dict"] for optimizer_file, _ in files]
    if layout.zero_stage == 3:
        shapes = load_file(str(files[0][1]))["param_shapes"]
        ranks = [_fragments_of_zero_3(state, shapes, layout.data_ranks) for state in states]
        return ranks, _flat_groups_of_zero_3(states[0])[0].steps
    ranks = [_fragments_of_zero_1_or_2(state) for state in states]
    return ranks, _flat_groups_of_zero_1_or_2(states[0])[0].steps


def _zero_files(folder: Path, data_rank: int, model_rank: int) -> tuple[Path, Path]:
    """(optimizer file, model file) of a rank; DeepSpeed puts `bf16_` before the name of some optimizer files."""
    stem = f"zero_pp_rank_{data_rank}_mp_rank_{model_rank:02d}"
    plain, half = folder / f"{stem}_optim_states.pt", folder / f"bf16_{stem}_optim_states.pt"
    return (half if half.is_file() else plain), folder / f"{stem}_model_states.pt"


@dataclass(frozen=True)
class _FlatGroup:
    """One rank's part of a parameter group: `values` by STATE_NAMES, each one flat tensor."""

    values: dict[str, Tensor]
    steps: int


def _flat_groups_of_zero_1_or_2(state: dict[str, Any]) -> list[_FlatGroup]:
    return _flat_groups(state["single_partition_of_fp32_groups"], state["base_optimizer_state"])


def _flat_groups_of_zero_3(state: dict[str, Any]) -> list[_FlatGroup]:
    return _flat_groups(state["fp32_flat_groups"], state["optimizer_state_dict"])


def _flat_groups(masters: list[Tensor], state: dict[str, Any]) -> list[_FlatGroup]:
    groups = []
    for index, master in enumerate(masters):
        moments = state["state"][index]
        values = {"master": master, **{key: moments[key] for key in MOMENTS}}
        groups.append(_FlatGroup(values, _steps_of(moments, state)))
    return groups


def _fragments_of_zero_1_or_2(state: dict[str, Any]) -> Fragments:
    """From where DeepSpeed says that the fragments lie in the flat groups; a rank may hold nothing of a parameter."""
    found: Fragments = {}
    groups = _flat_groups_of_zero_1_or_2(state)
    for group, slices in zip(groups, state["param_slice_mappings"], strict=True):
        for name, part in slices.items():
            found[name] = {key: value.narrow(0, part.start, part.numel) for key, value in group.values.items()}
    return found


def _fragments_of_zero_3(state: dict[str, Any], shapes: list[dict[str, Any]], data_ranks: int) -> Fragments:
    """ZeRO 3 cuts every parameter into equal parts, the last padded, and concatenates the parts of a rank."""
    groups = _flat_groups_of_zero_3(state)
    flat = {key: torch.cat([group.values[key].flatten() for group in groups]) for key in STATE_NAMES}
    found: Fragments = {}
    start = 0
    for group_shapes in shapes:
        for name, shape in group_shapes.items():
            size = -(-math.prod(shape) // data_ranks)
            found[name] = {key: value.narrow(0, start, size) for key, value in flat.items()}
            start += size
    return found
