"""DeepSpeed's configuration, derived from ours, with the raw keys of the `deepspeed` section merged in."""

import copy
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from overtok_megatron.config.counts import parameter_counts
from overtok_megatron.config.derived import accumulation_steps
from overtok_megatron.config.problems import Problem, refuse
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.wording import line, short
from overtok_megatron.errors import ConfigError

_LARGEST_BUCKET = 500_000_000  # gradients reduced at once; DeepSpeed's default
_REFUSED = {
    "optimizer": "use the optimizer section",
    "scheduler": "use optimizer.schedule",
    "fp16": "use training.precision (bf16 or fp32)",
    "tensorboard": "use logging.tensorboard",
    "pipeline": "use the parallel section",
    "activation_checkpointing": "use training.recompute",
}
# Our key for each derived one, named when a raw key contradicts it.
_OURS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "bf16.enabled": "training.precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "communication_data_type": "parallel.gradient_dtype",
    "data_types.grad_accum_dtype": "parallel.zero_stage (0 accumulates in the model's dtype)",
}


def derive(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for deepspeed.initialize.

    Gradients accumulate in float32 from ZeRO stage 1 on. Raises ConfigError where the raw keys break a rule.
    """
    refuse([*refused_keys(config), *contradictions(config, world_size)], lambda key: "deepspeed")
    result = _own_keys(config, world_size)
    # A default only: DeepSpeed's timer waits for the device at the start and at the end of every micro-batch. `speed/*` of the
    # metrics needs none of its numbers, and nothing prints them.
    result["timers"] = {"throughput": {"enabled": False}}
    _merge(result, config.deepspeed)
    if config.parallel.zero_stage > 0:
        # DeepSpeed allocates two buckets of this size per step, whatever the model: 4 GB for its 500 million elements
        size = min(_LARGEST_BUCKET, parameter_counts(config).dense)
        result["zero_optimization"].setdefault("reduce_bucket_size", size)
    if config.parallel.zero_stage == 1 and config.training.precision == "bf16":
        # Each gradient is added to its float32 sum and freed as soon as backward has made it. The sums are the same; 18 bytes
        # per parameter and micro-batch are read and written instead of 26, and no bf16 gradients of the whole model are kept.
        result["bf16"].setdefault("immediate_grad_update", True)
    return result


def refused_keys(config: RunConfig) -> Iterator[Problem]:
    """Raw keys that would replace a section of ours."""
    for key, way_out in _REFUSED.items():
        if key in config.deepspeed:
            yield Problem(f"deepspeed.{key}", f"is not passed through; {way_out}")


def contradictions(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Raw keys that have another value than the one that follows from our keys. The axes must divide the ranks."""
    raw = {key: value for key, value in config.deepspeed.items() if key not in _REFUSED}
    yield from _contradictions(_own_keys(config, world_size), raw, "")


def _contradictions(own: dict[str, Any], raw: dict[str, Any], prefix: str) -> Iterator[Problem]:
    for key, value in raw.items():
        name, derived = f"{prefix}{key}", own.get(key)
        if isinstance(value, dict) and isinstance(derived, dict):
            yield from _contradictions(derived, value, f"{name}.")
        elif key in own and derived != value:
            ours = _OURS.get(name)
            way_out = "remove it" if ours is None else f"set {ours} instead"
            message = f"{short(repr(value), 40)} contradicts {short(repr(derived), 60)}, which follows from the rest; {way_out}"
            yield Problem(f"deepspeed.{name}", message, () if ours is None else (ours.split(" ")[0],))


def _own_keys(config: RunConfig, world_size: int) -> dict[str, Any]:
    """What follows from our keys alone."""
    zero_stage = config.parallel.zero_stage
    bf16 = config.training.precision == "bf16"
    result: dict[str, Any] = {
        # to DeepSpeed context-parallel ranks are data-parallel ones, each with a batch of its own
        "train_batch_size": config.training.global_batch_size * config.parallel.context_parallel_size,
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "bf16": {"enabled": bf16},
        # DeepSpeed's own default is the model's precision, which would round what was summed in float32
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[config.parallel.gradient_dtype],
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if zero_stage > 0 and config.parallel.pipeline_parallel_size == 1:
        result["zero_optimization"]["overlap_comm"] = True  # gradients are reduced while backward goes on
    if config.parallel.sequence_parallel:
        # between stages DeepSpeed would send a part from each tensor-parallel rank, as if all held the same activations
        result["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if config.parallel.offload_optimizer == "cpu":
        result["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if bf16 and zero_stage > 0:
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def refused_by_deepspeed(config: RunConfig, error: Exception) -> ConfigError:
    """The error of a run whose raw keys DeepSpeed's reader does not take; `error`: what it raised."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        told = f"{name}: {short(repr(first['input']), 40)}: {first['msg']}"
    else:
        told = str(error)
    keys = short(", ".join(config.deepspeed))
    return ConfigError(line("deepspeed", f"{keys}: DeepSpeed says: {short(told, 150)}; correct the key, or remove it"))


def _merge(target: dict[str, Any], raw: dict[str, Any]) -> None:
    for key, value in raw.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = copy.deepcopy(value)
