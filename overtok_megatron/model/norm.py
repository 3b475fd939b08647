"""RMSNorm as a module, also over a dimension that is split over a tensor-parallel group.

Shapes: any leading dimensions (..), d the normalised size, d_shard this rank's part of it (all of it where d is not split).
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.kernels.reference import rms_norm_split
from overtok_megatron.parallel.collectives import all_reduce_in_place, copy_to_group, group_rank, group_size
from overtok_megatron.parallel.splits import mark_split, split_range


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension, of size d.

    group: the ranks over which d is split; None = not split. sum_group: the ranks that hold other positions each (sequence
    parallelism), over which the weight's gradient is summed.
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
        self.group = group
        self.sum_group = sum_group
        start, stop = split_range(size, group_size(group), group_rank(group))
        self.weight = nn.Parameter(torch.ones(stop - start))
        mark_split(self.weight, dim=0, full_shape=(size,), group=group)

    def forward(self, x: Tensor) -> Tensor:
        """[.., d_shard] -> [.., d_shard]."""
        weight = copy_to_group(self.weight, self.sum_group)
        if self.group is None:
            return self.kernels.rms_norm(x, weight, self.eps)
        sum_over_ranks = partial(all_reduce_in_place, group=self.group, of="a norm's sums")
        return rms_norm_split(x, weight, self.eps, self.size, sum_over_ranks)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} of {self.size}, eps={self.eps}"
