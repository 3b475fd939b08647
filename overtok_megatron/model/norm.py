"""RMSNorm with float32 statistics, also over a dimension that is split across a tensor-parallel group.

Shapes: any leading axes, d the normalised size, d_shard this rank's part of it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.parallel.collectives import copy_to_group

FusedNorm = Callable[[Tensor, Tensor, float], Tensor]


class _RMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps); where d is split, the sums over d are all-reduced in both directions.

    | | x, y | sum of squares | dx |
    | shard | [.., d_shard] | all-reduce | needs sum(dy w x) over d: all-reduce |
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, full_size: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        square_sum = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()  # [.., 1]
        if group is not None:
            dist.all_reduce(square_sum, group=group)
        scale = square_sum.div_(full_size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.full_size, ctx.group = full_size, group
        return torch.mul(x, scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]  # torch: *Any
        x, weight, scale = ctx.saved_tensors
        normed = torch.mul(x, scale)  # float32 [.., d_shard]
        grad_weight = torch.mul(normed, grad).flatten(0, -2).sum(0)
        scaled = torch.mul(grad, weight.float())
        dot = torch.linalg.vecdot(scaled, normed).unsqueeze(-1)  # [.., 1]
        if ctx.group is not None:
            dist.all_reduce(dot, group=ctx.group)
        normed.mul_(dot.div_(-ctx.full_size)).add_(scaled).mul_(scale)
        return normed.to(x.dtype), grad_weight.to(weight.dtype), None, None, None


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last axis.

    size: the full normalised size d. weight_size: this rank's part of it (default all). group: the group over which d
    is split; None = not split. sum_group: the group whose ranks each see other positions (sequence parallelism), over
    which the weight's gradient is summed. fused: a fused implementation (x, weight, eps) -> y for the unsplit case.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        weight_size: int | None = None,
        group: dist.ProcessGroup | None = None,
        sum_group: dist.ProcessGroup | None = None,
        fused: FusedNorm | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.group = group
        self.sum_group = sum_group
        self.fused = fused if group is None else None
        self.weight = nn.Parameter(torch.ones(size if weight_size is None else weight_size))

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to_group(self.weight, self.sum_group)
        if self.fused is not None:
            return self.fused(x, weight, self.eps)
        result: Tensor = _RMSNorm.apply(x, weight, self.eps, self.size, self.group)
        return result

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} of {self.size}, eps={self.eps}"
