"""The entry of a run in which something breaks in the twelfth step of rank 1: `python -m support.planted_entry CONFIG`.

FAULT says what: `nan`, in the sample of the rank's second micro-batch, which must hold one sample; `bit`, one flipped bit of a
weight after the step. The moment is printed. A run that is started again goes on without the fault.
"""

import math
import os
import time
from typing import Any

import torch

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.entry import run_and_leave

STEP, MICRO_BATCH = 12, 2
MARK = "broken at "  # before the seconds of time.time()


def planted(engine: TrainingEngine, fault: str, step: Any, *arguments: Any, **others: Any) -> Any:
    """The engine's step with the fault in it."""
    if fault == "nan":
        forward, calls = engine._forward, iter(range(1, 10**9))

        def with_nan(batch: Any) -> Any:
            result = forward(batch)
            if next(calls) != MICRO_BATCH:
                return result
            print(f"{MARK}{time.time()}", flush=True)
            return result._replace(main_loss=result.main_loss * math.nan, objective=result.objective * math.nan)

        engine._forward = with_nan  # type: ignore[method-assign]
        try:
            return step(engine, *arguments, **others)
        finally:
            engine._forward = forward  # type: ignore[method-assign]
    result = step(engine, *arguments, **others)
    weight = next(iter(engine.model.parameters())).detach().reshape(-1)
    weight.view(torch.int32)[0] ^= 1 << 3
    print(f"{MARK}{time.time()}", flush=True)
    return result


if __name__ == "__main__":
    whole_step, steps = TrainingEngine.step, iter(range(1, 10**9))

    def with_fault(self: TrainingEngine, *arguments: Any, **others: Any) -> Any:
        if os.environ["RANK"] == "1" and next(steps) == STEP:
            return planted(self, os.environ["FAULT"], whole_step, *arguments, **others)
        return whole_step(self, *arguments, **others)

    TrainingEngine.step = with_fault  # type: ignore[method-assign]
    run_and_leave()
