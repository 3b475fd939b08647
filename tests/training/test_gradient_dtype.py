"""Dense gradients travel between ranks in float32 unless asked otherwise, whatever the model's precision and the ZeRO stage."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, Layout, layout_config, own_tokens, stream

CHOICES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = [{"zero_stage": stage, "gradient_dtype": choice} for stage in range(4) for choice in CHOICES]
PIPELINE = [{"zero_stage": 1, "pipeline_parallel_size": 2, "gradient_dtype": choice} for choice in CHOICES]
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter")
LARGE = 512  # elements; norms and flags are reduced too


def travelling_dtypes(layouts: list[dict[str, Any]]) -> list[set[torch.dtype]]:
    """One rank's work: in which floating dtypes large tensors are reduced in a training step of each layout."""
    seen: set[torch.dtype] = set()

    def watched(original: Any) -> Any:
        def reduction(*arguments: Any, **more: Any) -> Any:
            for value in [*arguments, *more.values()]:
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, torch.Tensor) and tensor.numel() >= LARGE and tensor.is_floating_point():
                        seen.add(tensor.dtype)
            return original(*arguments, **more)

        return reduction

    for name in REDUCTIONS:
        setattr(dist, name, watched(getattr(dist, name)))
    found = []
    for parallel in layouts:
        case = Layout(
            parallel=parallel,
            training={"precision": "bf16", "micro_batch_size": 6},
            over={"enabled": False},
        )
        config = layout_config(case)
        engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
        seen.clear()
        engine.step(own_tokens(engine, stream()[0]), 1e-3)
        found.append(set(seen))
    return found


def check(world: int, layouts: list[dict[str, Any]]) -> None:
    for found in run_ranks(world, travelling_dtypes, layouts):
        assert found == [{CHOICES[parallel["gradient_dtype"]]} for parallel in layouts]


def test_gradients_travel_in_the_dtype_that_is_asked_for() -> None:
    check(2, LAYOUTS)


@pytest.mark.slow
def test_also_between_the_copies_of_a_pipeline() -> None:
    check(4, PIPELINE)
