"""Linear layers split over a tensor-parallel group, without biases (OLMo2 has none).

Shapes: b batch, s sequence, s_shard a slice of it under sequence parallelism, i inputs, o outputs, _shard this rank's part.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.parallel.collectives import (
    all_gather_sequence,
    copy_to_group,
    group_rank,
    group_size,
    reduce_from_group,
    reduce_scatter_sequence,
)
from overtok_megatron.parallel.splits import initialise, mark_split, split_range


class MergedColumnParallelLinear(nn.Module):
    """Several linear layers of one input, each split by outputs, as one product with one entry into the split region.

    outputs: name -> full output size; the weights are parameters of these names, [o_shard, i] each. Input
    [b, s, i] (or [b, s_shard, i] with sequence_parallel), output [b, s, sum of o_shard], in the order of `outputs`; `sizes`
    are the parts' widths.
    """

    def __init__(
        self,
        in_features: int,
        outputs: dict[str, int],
        *,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.outputs = dict(outputs)
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.sizes = []
        for name, size in self.outputs.items():
            start, stop = split_range(size, group_size(group), group_rank(group))
            weight = nn.Parameter(torch.empty(stop - start, in_features))
            mark_split(weight, dim=0, full_shape=(size, in_features), group=group)
            self.register_parameter(name, weight)
            self.sizes.append(stop - start)

    def reset(self, seed: int, name: str, std: float) -> None:
        for own_name, weight in self.named_parameters():
            initialise(weight, std, seed, f"{name}.{own_name}")

    def forward(self, x: Tensor) -> Tensor:
        whole = all_gather_sequence(x, self.group, 1) if self.sequence_parallel else copy_to_group(x, self.group)
        weight = torch.cat([getattr(self, name) for name in self.outputs])  # small beside the activations
        return F.linear(whole, weight)

    def extra_repr(self) -> str:
        place = f"rank {group_rank(self.group)} of {group_size(self.group)}"
        return f"in_features={self.in_features}, outputs={self.outputs}, {place}"


class RowParallelLinear(nn.Module):
    """A linear layer split by inputs: [b, s, i_shard] -> [b, s, o] summed over the group, or its slice [b, s_shard, o]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.full_shape = (out_features, in_features)
        self.group = group
        self.sequence_parallel = sequence_parallel
        start, stop = split_range(in_features, group_size(group), group_rank(group))
        self.weight = nn.Parameter(torch.empty(out_features, stop - start))
        mark_split(self.weight, dim=1, full_shape=self.full_shape, group=group)

    def reset(self, seed: int, name: str, std: float) -> None:
        initialise(self.weight, std, seed, f"{name}.weight")

    def forward(self, x: Tensor) -> Tensor:
        partial = F.linear(x, self.weight)
        if self.sequence_parallel:
            return reduce_scatter_sequence(partial, self.group, 1)
        return reduce_from_group(partial, self.group)

    def extra_repr(self) -> str:
        place = f"rank {group_rank(self.group)} of {group_size(self.group)}"
        return f"in_features={self.full_shape[1]}, out_features={self.full_shape[0]}, {place}"
