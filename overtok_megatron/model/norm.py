"""RMSNorm as modules: alone, and together with what stands beside it in a layer, which one kernel computes where it can.

Each form is a module of its own, because ZeRO 3 gathers a module's weight when the module is called, and not otherwise.

Shapes: any leading dimensions (..), d the normalised size, b batch, s sequence, h_shard heads of this rank, e head size.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.parallel.collectives import all_reduce_in_place, copy_to_group, group_rank, group_size
from overtok_megatron.parallel.splits import mark_split, split_range


class _NormWeight(nn.Module):
    """The weight of a norm over d = `size`, of which this rank holds its part where d is split over `group`.

    sum_group: the ranks that hold other positions each (sequence parallelism), over which the weight's gradient is summed.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        kernels: Kernels,
        group: dist.ProcessGroup | None = None,
        sum_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.kernels = kernels
        self.sum_group = sum_group
        start, stop = split_range(size, group_size(group), group_rank(group))
        self.weight = nn.Parameter(torch.ones(stop - start))
        mark_split(self.weight, dim=0, full_shape=(size,), group=group)

    @property
    def used_weight(self) -> Tensor:
        """The weight for a forward pass; its gradient is summed over `sum_group`."""
        return copy_to_group(self.weight, self.sum_group)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} of {self.size}, eps={self.eps}"


class RMSNorm(_NormWeight):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension, of size d."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., d] -> [.., d]."""
        return self.kernels.rms_norm(x, self.used_weight, self.eps)


class RMSNormAdded(_NormWeight):
    """x + RMSNorm(branch): how a layer with post-norm joins a branch."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """[.., d] twice -> [.., d]."""
        return self.kernels.add_normed(x, branch, self.used_weight, self.eps)


class RMSNormOfSum(_NormWeight):
    """x + branch, and RMSNorm of it: how a layer with pre-norm joins a branch and begins the next."""

    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """[.., d] twice -> the sum and its norm, [.., d] each."""
        return self.kernels.norm_of_sum(x, branch, self.used_weight, self.eps)


class RotatedRMSNorm(_NormWeight):
    """RMSNorm over all heads of queries or of keys, and the rotation of each head. `group`: the ranks that split the heads."""

    def __init__(self, size: int, *, eps: float, kernels: Kernels, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(size, eps=eps, kernels=kernels, group=group)
        self._sum = None if group is None else partial(all_reduce_in_place, group=group, of="a norm's sums")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [b, s, h_shard e]; cos, sin [(b,) s, 1, e/2] float32 -> [b, s, h_shard, e]."""
        return self.kernels.norm_and_rotate(x, self.weight, self.eps, cos, sin, self.size, self._sum)
