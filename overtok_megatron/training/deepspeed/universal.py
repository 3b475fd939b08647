"""What DeepSpeed's own converter (`ds_to_universal`) needs to know of the parameters beside its files."""

import re
from typing import Any

from torch import nn

from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.parallel.splits import full_shape, splits_of

_VERSION = 0.2  # of the information below


def universal_info(
    parameters: dict[str, nn.Parameter], split_dims: dict[str, int], grid: ProcessGrid
) -> dict[str, Any]:
    """The entry of the client state that the converter reads; all ranks must call this.

    parameters: of this rank's stage, by name. split_dims: the dimension along which each of them that is split is split.
    """
    own: dict[str, int | None] = {name: split_dims.get(name) for name in parameters}
    everyone: dict[str, int | None] = {}
    for dims in grid.gather_objects(own):
        everyone |= dims
    # Dimension 1 and whole copies have names; dimension 0 is the default. A dimension beyond them is told as a sub-parameter.
    kinds = {"parameter_with_row_parallelism_patterns": 1, "tp_replicated_parameter_patterns": None}
    info: dict[str, Any] = {"universal_checkpoint_version": _VERSION}
    for key, dim in kinds.items():
        info[key] = [_pattern(name) for name, split_dim in everyone.items() if split_dim == dim]
    info["parameter_with_sub_params"] = _sub_parameters(parameters, grid)
    return {"universal_checkpoint_info": info}


def _sub_parameters(parameters: dict[str, nn.Parameter], grid: ProcessGrid) -> list[dict[str, Any]]:
    """The parameters of all stages that are split along a dimension beyond the second, as DeepSpeed's SubparamShape: one
    part of a shape, which is cut evenly along that dimension."""
    own = {}
    for name, parameter in parameters.items():
        for split in splits_of(parameter):
            if split.dim > 1:
                shape = list(full_shape(parameter))
                shape[split.dim] = 1
                own[name] = {"patterns": [_pattern(name)], "shape": shape, "partition_dim": split.dim}
    everyone: dict[str, dict[str, Any]] = {}
    for found in grid.gather_objects(own):
        everyone |= found
    return list(everyone.values())


def _pattern(name: str) -> str:
    """The regular expression that matches just this name."""
    return f"^{re.escape(name)}$"
