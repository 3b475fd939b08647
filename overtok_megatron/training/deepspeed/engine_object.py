"""What a running engine of DeepSpeed holds, read and set from outside: its dense weights and its count of steps."""

from typing import Any

import deepspeed
from torch import Tensor


def dense_weights(deepspeed_engine: Any) -> dict[str, Tensor]:
    """This rank's dense weights by name; under ZeRO 3, where ranks hold parts, copies of whole ones in host memory.

    Under ZeRO 3 all ranks must call this.
    """
    parameters = deepspeed_engine.module.named_parameters()
    if deepspeed_engine.zero_optimization_stage() < 3:
        return {name: parameter.detach() for name, parameter in parameters}
    weights = {}
    for name, parameter in parameters:
        with deepspeed.zero.GatheredParameters(parameter):
            weights[name] = parameter.detach().cpu().clone()
    return weights


def steps_taken(deepspeed_engine: Any) -> int:
    """How many optimizer steps the engine has taken, those before a resume included."""
    return int(deepspeed_engine.global_steps)


def set_progress(deepspeed_engine: Any, *, steps: int, samples: int) -> None:
    """Let the engine count on from `steps` optimizer steps and `samples` samples, where it did not load its own files."""
    deepspeed_engine.global_steps = steps
    deepspeed_engine.global_samples = samples
