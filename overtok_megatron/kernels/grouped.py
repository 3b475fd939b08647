"""One matrix product per expert, over tokens that are sorted by expert: torch's grouped product on CUDA, else a loop.

Shapes: E experts, n choices over all experts, i inputs, o outputs; ends [E] int64, where each expert's choices end.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _GroupedLinear(torch.autograd.Function):
    """| forward | y_e = x_e W_e^T | backward | dx_e = g_e W_e, dW_e = g_e^T x_e, zero for an expert without tokens |"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return products(x, weight.mT, ends, grouped=_has_grouped(x, weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, ends = ctx.saved_tensors
        grad, grouped = grad.contiguous(), _has_grouped(x, weight)
        return products(grad, weight, ends, grouped=grouped), outer_products(grad, x, ends, grouped=grouped), None


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [n, i], weight [E, o, i] -> [n, o]: each vector of x times the weight of its expert."""
    result: Tensor = _GroupedLinear.apply(x, weight, ends)
    return result


def _has_grouped(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product applies: bfloat16 on CUDA, vectors that start at multiples of 16 bytes."""
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    return hasattr(F, "grouped_mm") and x.is_cuda and x.dtype == torch.bfloat16 and aligned


def products(x: Tensor, weight: Tensor, ends: Tensor, *, grouped: bool) -> Tensor:
    """x [n, i], weight [E, i, o] -> [n, o]. grouped: in one call, which need not copy `ends` to the host."""
    if grouped:
        result: Tensor = F.grouped_mm(x, weight, offs=ends.int())
        return result
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[expert], out=out[start:end])
        start = end
    return out


def outer_products(left: Tensor, right: Tensor, ends: Tensor, *, grouped: bool) -> Tensor:
    """left [n, o], right [n, i] -> [E, o, i], summed over the tokens of each expert."""
    if grouped:
        sums: Tensor = F.grouped_mm(left.mT, right, offs=ends.int())
        counts = ends.diff(prepend=ends.new_zeros(1))
        return sums.masked_fill_((counts == 0).view(-1, 1, 1), 0.0)  # what it writes for an empty sum is not documented
    out = left.new_empty(ends.numel(), left.shape[1], right.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(left[start:end].mT, right[start:end], out=out[expert])
        else:
            out[expert].zero_()
        start = end
    return out
