"""The softmax passes over logits, compiled by torch.compile: on CUDA Inductor makes one Triton kernel of each.

Signatures and results are those of reference.py, up to rounding. The functions are written for the compiler. A maximum that
is followed by the sum of exp(logit - maximum) is what Inductor reads in one pass (its `online_softmax`); the target's place
is found by comparing column numbers, because a scatter would need a float32 copy of the logits; the gradient is written
where the logits were. So a chunk is read twice, the second time mostly from the cache, and written once, and nothing of its
shape is allocated.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.kernels import reference
from overtok_megatron.kernels.compiled import compiled_copy


def _statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [c, v] -> their maximum and the sum of exp(logit - maximum), [c, 1] float32."""
    wide = logits.float()
    largest = wide.amax(dim=1, keepdim=True)
    return largest, (wide - largest).exp().sum(dim=1, keepdim=True)


def _write_gradient(logits: Tensor, log_sum: Tensor, scale: Tensor, target: Tensor) -> None:
    """The arguments other than logits are [c, 1]. The powers are computed anew: shared ones would be kept, as float32."""
    is_target = torch.arange(logits.shape[1], device=logits.device) == target  # [c, v]
    logits.copy_((logits.float() - log_sum).exp() * scale - is_target.float())


def plain_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    largest, exp_sum = _statistics(logits)
    return largest.squeeze(1), exp_sum.squeeze(1)


def plain_gradient(logits: Tensor, log_sum: Tensor, scale: Tensor, target: Tensor) -> None:
    _write_gradient(logits, log_sum.unsqueeze(1), scale.unsqueeze(1), target.unsqueeze(1))


def plain_loss_and_gradient(
    logits: Tensor, target: Tensor, scored: Tensor, z_loss_weight: float
) -> tuple[Tensor, Tensor]:
    target_logit = reference.target_logits(logits, target)  # c values, read before they are overwritten
    largest, exp_sum = _statistics(logits)
    log_sum = exp_sum.log() + largest
    scale = reference.loss_scale(scored.unsqueeze(1), log_sum, z_loss_weight)
    _write_gradient(logits, log_sum, scale, target.unsqueeze(1))
    return log_sum.squeeze(1), target_logit


def _compiled(plain: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, compiled once for each number of columns and for any number of rows.

    The compiler takes sizes of 0 and 1 for constants, so that chunks of one row would be compiled apart in mid-run: these
    go to `otherwise`, as those without columns do.
    """
    made: dict[tuple[Any, ...], Callable[..., Any]] = {}

    @functools.wraps(plain)
    def call(logits: Tensor, *columns: Any) -> Any:
        if logits.shape[0] <= 1 or logits.shape[1] == 0:
            return otherwise(logits, *columns)
        layout = (logits.shape[1], logits.dtype, logits.device, *(each for each in columns if isinstance(each, float)))
        if layout not in made:
            # With `split_reductions`, Inductor would plan for the number of rows of the first call, and a row of few rows
            # would be reduced in several loops.
            made[layout] = compiled_copy(plain, len(made), split_reductions=False)
        for values in (logits, *(each for each in columns if isinstance(each, Tensor))):
            torch._dynamo.maybe_mark_dynamic(values, 0)
        return made[layout](logits, *columns)

    return call


def compiled_softmax() -> dict[str, Any]:
    """The compiled passes by their names in `Kernels`. Each is compiled at its first call, in seconds."""
    return {
        "softmax_statistics": _compiled(plain_statistics, reference.softmax_statistics),
        "softmax_gradient": _compiled(plain_gradient, reference.softmax_gradient),
        "softmax_loss_and_gradient": _compiled(plain_loss_and_gradient, reference.softmax_loss_and_gradient),
    }
