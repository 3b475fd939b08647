"""Whether a step returns with its loss and norm while the device still updates the parameters.

The update is made long: a kernel that only sleeps is put before it, behind the mark that reads wait for.
"""

import math
import time

import torch

from gpu_checks.registry import Context, Result
from gpu_checks.training import Settings, engine_of, made_tokens, own_part, small_configuration
from overtok_megatron.training.step_result import StepResult

_CYCLES = 1_000_000_000  # about half a second
_WAYS: dict[str, Settings] = {
    "zero 1": {"parallel.zero_stage": 1, "training.precision": "bf16"},
    "zero 2": {"parallel.zero_stage": 2, "training.precision": "bf16"},
    "zero 3": {"parallel.zero_stage": 3, "training.precision": "bf16"},
    "no zero, float32": {"parallel.zero_stage": 0},
}


def early_reads(context: Context) -> Result:
    """A step of ZeRO 1 returns in less than half the time that its update takes, with the loss and norm of any other run.

    Of the other stages it is reported: DeepSpeed may wait for the device in them.
    """
    slept = _sleep_seconds()
    numbers: dict[str, float] = {}
    equal = True
    for name, way in _WAYS.items():
        plain, _ = _last_step(context, way, long_update=False)
        delayed, numbers[name] = _last_step(context, way, long_update=True)
        pairs = ((plain.loss, delayed.loss), (plain.grad_norm, delayed.grad_norm))
        equal = equal and all(math.isclose(one, other, rel_tol=1e-3) for one, other in pairs)
    figure = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in numbers.items())
    passed = equal and numbers["zero 1"] < slept / 2
    return Result(passed, figure, f"zero 1 in half of {1e3 * slept:.0f} ms", numbers | {"sleep": slept})


def _sleep_seconds() -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.cuda._sleep(_CYCLES)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _last_step(context: Context, way: Settings, *, long_update: bool) -> tuple[StepResult, float]:
    """The third step's result, and the seconds after which it was there."""
    config = small_configuration(context, context.cuda, way)
    engine = engine_of(context, config)
    *first, last = [own_part(engine, tokens).to(engine.device) for tokens in made_tokens(context, config, 3)]
    for tokens in first:
        engine.step(tokens, 1e-3)
    if long_update:
        engine.optimizer.register_step_pre_hook(lambda *_: torch.cuda._sleep(_CYCLES))
    torch.cuda.synchronize()
    started = time.perf_counter()
    result = engine.step(last, 1e-3)
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return result, seconds
