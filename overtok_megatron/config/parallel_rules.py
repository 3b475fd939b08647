"""Rules about how the ranks divide a run: the axes, the pipeline, ZeRO, and the batch over them."""

import math
from collections.abc import Iterator

from overtok_megatron.config.derived import (
    accumulation_steps,
    blocks_per_stage,
    data_parallel_size,
    even_parts,
)
from overtok_megatron.config.nearest import nearest_divisor, nearest_multiple, number_does
from overtok_megatron.config.problems import PROCESSES, Problem, problem
from overtok_megatron.config.schema import RunConfig

MOST_RANKS = 2**20

_TENSOR, _CONTEXT = "parallel.tensor_parallel_size", "parallel.context_parallel_size"
_PIPELINE, _PARTITION = "parallel.pipeline_parallel_size", "parallel.pipeline_partition"
_AXES = (_TENSOR, _CONTEXT, _PIPELINE)  # on which the number of data-parallel ranks depends
_ZERO_STAGE = "parallel.zero_stage"


def axis_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Axes that do not divide the ranks. Only without these are the rules about shares of a rank asked."""
    if world_size > MOST_RANKS:
        yield problem(PROCESSES, world_size, f"at most {MOST_RANKS} ranks can train together")
        return
    taken = 1
    for name in ("tensor_parallel_size", "context_parallel_size", "pipeline_parallel_size"):
        size = getattr(config.parallel, name)
        left = world_size // taken
        if left % size:
            beside = f" left by the other axes of {world_size}" if taken > 1 else " (--processes)"
            reason = f"does not divide the {left} ranks{beside}; {number_does(nearest_divisor(left, size))}"
            yield problem(f"parallel.{name}", size, reason)
        else:
            taken *= size


def parallel_problems(config: RunConfig, world_size: int, *, divided: bool) -> Iterator[Problem]:
    """What else breaks the rules of the parallel section. divided: whether the axes divide the ranks."""
    parallel = config.parallel
    tensor, context, zero_stage = parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.zero_stage
    if parallel.sequence_parallel and tensor == 1:
        reason = "splits nothing with parallel.tensor_parallel_size 1; write false"
        yield problem("parallel.sequence_parallel", True, reason, (_TENSOR,))
    yield from _pipeline_problems(config)
    if tensor > 1 and zero_stage == 3:
        reason = "does not go with parallel.tensor_parallel_size > 1: both split the weights; use 2, or tensor_parallel_size 1"
        yield problem(_ZERO_STAGE, zero_stage, reason, (_TENSOR,))
    if parallel.offload_optimizer != "none" and zero_stage == 0:
        reason = "needs parallel.zero_stage 1 or more, which owns the state that moves; use zero_stage 1, or none"
        yield problem("parallel.offload_optimizer", parallel.offload_optimizer, reason, (_ZERO_STAGE,))
    length, slices = config.data.seq_length, tensor * context
    if length % slices:
        names = _TENSOR + (" x context_parallel_size" if context > 1 else "")
        reason = f"must be a multiple of {names} {slices}; {math.ceil(length / slices) * slices} is"
        yield problem("data.seq_length", length, reason, (_TENSOR, _CONTEXT))
    if divided:
        data, micro = data_parallel_size(config, world_size), config.training.micro_batch_size
        batch, unit = config.training.global_batch_size, micro * data
        if batch % unit:
            reason = (
                f"must be a multiple of micro_batch_size {micro} x {data} data-parallel ranks; "
                f"{nearest_multiple(unit, batch)} is"
            )
            yield problem("training.global_batch_size", batch, reason, _AXES)


def _pipeline_problems(config: RunConfig) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.num_layers
    stages, partition, zero_stage = parallel.pipeline_parallel_size, parallel.pipeline_partition, parallel.zero_stage
    if isinstance(partition, list) and (len(partition) != stages or sum(partition) != layers):
        even = "does"
        if stages <= 16:
            even = f"is {even_parts(layers, stages)}"
        reason = f"must be {stages} numbers (pipeline_parallel_size) with the sum {layers} (model.num_layers); uniform {even}"
        yield problem(_PARTITION, partition, reason, (_PIPELINE,))
    if stages == 1:
        return
    too_many = not isinstance(partition, list) and stages > layers
    if too_many or not all(blocks_per_stage(config)[1:-1]):
        reason = (
            f"leaves stages without a block: there are {layers} (model.num_layers); {min(stages, layers)} is the most"
        )
        yield problem(_PIPELINE, stages, reason, (_PARTITION,))
    if zero_stage > 1:
        reason = (
            "does not go with pipeline_parallel_size > 1: gradients of all micro-batches stay on the stage until the step "
            "ends, so DeepSpeed cannot split them; use 1"
        )
        yield problem(_ZERO_STAGE, zero_stage, reason, (_PIPELINE,))
    if config.training.precision == "bf16" and zero_stage != 1:
        reason = (
            "with bf16 and a pipeline adds the gradients of micro-batches in bfloat16, which loses small ones; use 1"
        )
        yield problem(_ZERO_STAGE, zero_stage, reason, (_PIPELINE,))
    if parallel.offload_optimizer != "none":
        reason = (
            "is not offered by DeepSpeed's pipeline engine for this optimizer; use none, or pipeline_parallel_size 1"
        )
        yield problem("parallel.offload_optimizer", parallel.offload_optimizer, reason, (_PIPELINE,))


def precision_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Sums of gradients in bfloat16. The axes must divide the ranks."""
    steps, zero_stage = accumulation_steps(config, world_size), config.parallel.zero_stage
    if config.training.precision == "bf16" and zero_stage == 0 and steps != 1:
        reason = f"with bf16 adds the gradients of {steps} micro-batches in bfloat16, which loses small ones; use 1"
        yield problem(_ZERO_STAGE, zero_stage, reason, (*_AXES, "training.global_batch_size"))
