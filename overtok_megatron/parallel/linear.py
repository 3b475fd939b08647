"""Linear layers split over a tensor-parallel group of p ranks, without biases (OLMo2 has none).

y = x W^T. A column-parallel layer splits the outputs, a row-parallel one the inputs, so a pair of them needs no collective
in between (arXiv 1909.08053):

    W [o, i] by outputs (column-parallel)        W [o, i] by inputs (row-parallel)

        | W_1 |   y_r   = x W_r^T                    W = [ W_1 | W_2 | .. | W_p ]
    W = | W_2 |   y     = [ y_1 | .. | y_p ]
        | ..  |   rank r holds W_r [o_shard, i]      y   = sum_r x_r W_r^T
        | W_p |                                      rank r holds W_r [o, i_shard]

Names as in the field: "column" and "row" are those of W^T.
Shapes: b batch, s sequence, s_shard the slice of it that one of the p ranks holds under sequence parallelism, i inputs,
o outputs, _shard this rank's part.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.parallel.collectives import (
    all_gather_sequence,
    copy_to_group,
    gather_from_group,
    group_rank,
    group_size,
    reduce_from_group,
    reduce_scatter_sequence,
)
from overtok_megatron.parallel.splits import initialise, mark_split, split_range


class MergedColumnParallelLinear(nn.Module):
    """Several linear layers of one input, each split by outputs, computed as one product.

    outputs: name -> full output size. The weights are parameters of these names, [o_shard, i] each. The output has them in
    this order, side by side, `sizes` wide. On rank r, with W_r the weights on top of each other:

    |         | with sequence_parallel                             | without                                  |
    | input   | x_r [b, s_shard, i]                                | x [b, s, i], the same on all ranks       |
    | forward | x = all-gather(x_r); y_r = x W_r^T [b, s, o_shard] | y_r = x W_r^T [b, s, o_shard]            |
    | dgrad   | dx_r = reduce-scatter(dy_r W_r) [b, s_shard, i]    | dx = all-reduce(dy_r W_r) [b, s, i]      |
    | wgrad   | dW_r = dy_r^T x [o_shard, i]                       | dW_r = dy_r^T x [o_shard, i]             |
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

    @property
    def weights(self) -> list[Tensor]:
        """[o_shard, i] each, in the order of `outputs`."""
        return [self.get_parameter(name) for name in self.outputs]

    def forward(self, x: Tensor) -> Tensor:
        # From here on x is [b, s, i], the same on all ranks.
        x = all_gather_sequence(x, self.group, 1) if self.sequence_parallel else copy_to_group(x, self.group)
        weight = torch.cat(self.weights)  # a copy, but small beside the activations
        return F.linear(x, weight)  # [b, s, sum of o_shard]

    def extra_repr(self) -> str:
        ranks = f"rank {group_rank(self.group)} of {group_size(self.group)}"
        return f"in_features={self.in_features}, outputs={self.outputs}, {ranks}"


class SlicedInputLinear(nn.Module):
    """A linear layer whose weight is on all ranks, each of which computes a slice of the sequence of its own. On rank r:

    |         | with sequence_parallel                             | without                                            |
    | input   | x_r [b, s_shard, i]                                | x_r [b, s_shard, i], from `split_over_group`       |
    | forward | y_r = x_r W^T [b, s_shard, o]                      | y = all-gather(x_r W^T) [b, s, o]                  |
    | dgrad   | dx_r = dy_r W [b, s_shard, i]                      | dx_r = (own slice of dy) W [b, s_shard, i]         |
    | wgrad   | dW = all-reduce(dy_r^T x_r) [o, i]                 | dW = all-reduce(dy_r^T x_r) [o, i]                 |
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def reset(self, seed: int, name: str, std: float) -> None:
        initialise(self.weight, std, seed, f"{name}.weight")

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to_group(self.weight, self.group)  # each rank saw a slice: the weight's gradient is summed
        own = F.linear(x, weight)
        return own if self.sequence_parallel else gather_from_group(own, self.group, 1)

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, whole on all ranks"


class RowParallelLinear(nn.Module):
    """A linear layer split by inputs. On rank r:

    |         | with sequence_parallel                             | without                                  |
    | input   | x_r [b, s, i_shard]                                | x_r [b, s, i_shard]                      |
    | forward | y_r = reduce-scatter(x_r W_r^T) [b, s_shard, o]    | y = all-reduce(x_r W_r^T) [b, s, o]      |
    | dgrad   | dy = all-gather(dy_r); dx_r = dy W_r               | dx_r = dy W_r [b, s, i_shard]            |
    | wgrad   | dW_r = dy^T x_r [o, i_shard]                       | dW_r = dy^T x_r [o, i_shard]             |
    """

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
        partial = F.linear(x, self.weight)  # [b, s, o], one of the p terms of a sum
        if self.sequence_parallel:
            return reduce_scatter_sequence(partial, self.group, 1)
        return reduce_from_group(partial, self.group)

    def extra_repr(self) -> str:
        ranks = f"rank {group_rank(self.group)} of {group_size(self.group)}"
        return f"in_features={self.full_shape[1]}, out_features={self.full_shape[0]}, {ranks}"
