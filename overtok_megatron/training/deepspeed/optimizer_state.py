"""DeepSpeed's checkpoint files read safely, and their master weights and moments put back, whatever ZeRO stage runs.

Needed where a checkpoint comes from another layout; on the same layout DeepSpeed loads its own files.
"""

from typing import Any

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from overtok_megatron.checkpoint.engine_state import MOMENTS, ParameterState
from overtok_megatron.errors import CheckpointError

# Classes that DeepSpeed pickles into its checkpoints and that hold plain numbers only.
_PLAIN_CLASSES: list[Any] = [LossScaler, ZeroStageEnum, fragment_address, np.dtype, np.ndarray]


def load_engine_file(path: str, map_location: Any = "cpu") -> Any:
    """One of DeepSpeed's files, without executing what it holds."""
    with torch.serialization.safe_globals(_PLAIN_CLASSES):
        return torch.load(path, map_location=map_location, weights_only=True)


@torch.no_grad()
def set_parameter_state(engine: Any, parameter: nn.Parameter, state: ParameterState) -> None:
    """Put a parameter's master weight, moments and step count where its optimizer keeps them, and its value in place.

    state: this tensor-parallel rank's part. Needs no other rank.
    """
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.Optimizer):
        parameter.data.copy_(state.values["master"])
        _set_plain(optimizer, parameter, state)
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        _set_stage_3(optimizer, parameter, state)
    elif kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        parameter.data.copy_(state.values["master"])
        _set_fragment(optimizer, parameter, state)
    elif kind == "FP16_Optimizer":
        raise CheckpointError(
            "parallel.zero_stage: 0; with bf16 and apex's AdamW it resumes on the layout that wrote the checkpoint only, and "
            "starts from no other weights; "
            "use 1, or training.kernels: torch"
        )
    else:
        assert kind == "FP16_UnfusedOptimizer", f"unknown DeepSpeed optimizer {kind}"
        parameter.data.copy_(state.values["master"])
        _set_master(optimizer, parameter, state)


def _fresh(optimizer: torch.optim.Optimizer, group: dict[str, Any], key: Tensor, steps: int) -> dict[str, Any]:
    """The state of a tensor that the torch optimizer steps on, made as torch's AdamW would, with `steps` done."""
    own: dict[str, Any] = optimizer.state[key]
    for moment in MOMENTS:
        if moment not in own:
            own[moment] = torch.zeros_like(key)
    if "step" in group:  # apex counts once a group
        group["step"] = steps
    else:
        device = key.device if group.get("fused") or group.get("capturable") else "cpu"
        own["step"] = torch.tensor(float(steps), dtype=torch.float32, device=device)
    return own


def _set_plain(optimizer: torch.optim.Optimizer, key: Tensor, state: ParameterState) -> None:
    group = next(group for group in optimizer.param_groups if any(key is other for other in group["params"]))
    own = _fresh(optimizer, group, key, state.steps)
    for moment in MOMENTS:
        own[moment].copy_(state.values[moment])


def _set_master(optimizer: Any, parameter: nn.Parameter, state: ParameterState) -> None:
    """bf16 without ZeRO: float32 masters in lists beside the parameters."""
    for lows, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for low, master in zip(lows, masters, strict=True):
            if low is parameter:
                master.data.copy_(state.values["master"])
                _set_plain(optimizer.optimizer, master, state)
                return
    raise AssertionError("a parameter that its optimizer does not know")


def _set_fragment(optimizer: Any, parameter: nn.Parameter, state: ParameterState) -> None:
    """ZeRO 1 and 2: this rank's flat partition of the group may hold all, a part, or nothing of the parameter."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # where DeepSpeed says that it lies
    if mapping is None:
        return
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address

    def own(key: str) -> Tensor:
        return state.values[key].flatten().narrow(0, here.start, here.numel)

    mapping.hp_fragment.copy_(own("master"))
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    flat = flats[mapping.param_group_index]
    group = optimizer.optimizer.param_groups[mapping.param_group_index]
    moments = _fresh(optimizer.optimizer, group, flat, state.steps)
    for moment in MOMENTS:
        moments[moment].narrow(0, there.start, there.numel).copy_(own(moment))


def _set_stage_3(optimizer: Any, parameter: nn.Parameter, state: ParameterState) -> None:
    """ZeRO 3: equal parts of every parameter, the last padded."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    rank = optimizer._get_param_partition_rank(parameter)

    def own(key: str) -> Tensor:
        flat = state.values[key].flatten()
        part = flat[rank * size : (rank + 1) * size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))

    sub_group, _, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[sub_group]]
    _fresh(optimizer.optimizer, group, optimizer.fp32_partitioned_groups_flat[sub_group], state.steps)
    safe_set_local_fp32_param(parameter, own("master"))
    parameter.ds_tensor.data.copy_(own("master"))  # type: ignore[attr-defined]
    for moment in MOMENTS:
        safe_set_local_optimizer_state(parameter, own(moment), moment)
