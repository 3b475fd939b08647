"""A mixture of SwiGLU experts without capacity limits: every token reaches every expert that it chose.

Shapes: b batch, s this context rank's slice of the sequence, s_shard the part of s that a tensor-parallel rank holds under
sequence parallelism (else s), d hidden, E experts, k experts per token, n = b s tokens, f intermediate size of an expert,
f_shard this rank's part of it. Tensor parallelism splits every expert; every rank holds the whole router. Where a sequence is
split, each rank routes its own positions; sequence parallelism then gathers these positions and their choices over the tensor
group. Experts are not spread over ranks here (expert parallelism).

The router's own loss has two parts. Each is a sum over positions; the weights average it over the layers.
balance: E sum_e f_e p_e. f_e is the share of the micro-batch's choices that went to expert e, over the positions of all
context- and tensor-parallel ranks; p_e is the router's probability. (arXiv 2409.02060, eq. 4; it is 1 where all experts are
chosen alike; equal to transformers' load_balancing_loss_func of one layer, divided by k.) f_e has no gradient. It covers one
micro-batch of one data-parallel rank, so the loss of the run is a mean over micro-batches and ranks, each with its own shares.
z: log(sum exp logits)^2 (eq. 5).

Besides its loss a router returns statistics [F], detached float32, for reports: how often it chose each of the E experts,
the sum of balance over its positions, and the sum of z where z has a weight. They are an output and not a counter in the
module, so that a layer that backward computes again is counted once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.kernels.grouped import grouped_linear
from overtok_megatron.model.feed_forward import FeedForward, Routing
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


class _Dispatch(torch.autograd.Function):
    """| forward | x[permutation // k] | backward | sum over k of g[inverse] | : a gather both ways, so no atomic additions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[permutation // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """| forward | sum over k of y[inverse] | backward | g[permutation // k] | : the conjugate of _Dispatch."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, permutation: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(permutation)
        ctx.k = k
        return y[inverse].view(-1, k, y.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (permutation,) = ctx.saved_tensors
        return grad[permutation // ctx.k], None, None, None


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How a router sends tokens to experts, and the weights of its own losses (explained above).

    normalize_weights: the weights of a token's experts are scaled to sum to 1.
    """

    num_experts: int
    experts_per_token: int
    normalize_weights: bool
    balance_weight: float
    z_weight: float


class MixtureOfExperts(FeedForward):
    """Router and experts; a token's output is the sum over its experts, each times the router's weight for it."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        rule: RoutingRule,
        kernels: Kernels,
        tensor_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.kernels = kernels
        self.tensor_group = tensor_group
        self.context_group = context_group
        self.sequence_parallel = sequence_parallel
        start, stop = split_range(intermediate_size, group_size(tensor_group), group_rank(tensor_group))
        num_experts, d, f, f_shard = rule.num_experts, hidden_size, intermediate_size, stop - start
        self.router = nn.Parameter(torch.empty(num_experts, d))
        self.experts_gate = nn.Parameter(torch.empty(num_experts, f_shard, d))
        self.experts_up = nn.Parameter(torch.empty(num_experts, f_shard, d))
        self.experts_down = nn.Parameter(torch.empty(num_experts, d, f_shard))
        mark_split(self.experts_gate, dim=1, full_shape=(num_experts, f, d), group=tensor_group)
        mark_split(self.experts_up, dim=1, full_shape=(num_experts, f, d), group=tensor_group)
        mark_split(self.experts_down, dim=2, full_shape=(num_experts, d, f), group=tensor_group)

    def reset(self, seed: int, name: str, std: float) -> None:
        for own_name, weight in self.named_parameters():
            initialise(weight, std, seed, f"{name}.{own_name}")

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """[b, s_shard, d] -> [b, s_shard, d], summed over the tensor group already, and what the router reports."""
        sequence_group = self.tensor_group if self.sequence_parallel else None
        logits = F.linear(x, copy_to_group(self.router, sequence_group)).float()  # [b, s_shard, E]
        probabilities = logits.softmax(dim=-1)
        weights, chosen = probabilities.topk(self.rule.experts_per_token, dim=-1)  # [b, s_shard, k]
        if self.rule.normalize_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        if self.sequence_parallel:
            x, weights = (all_gather_sequence(tensor, self.tensor_group, 1) for tensor in (x, weights))  # [b, s, ..]
            chosen = gather_from_group(chosen, self.tensor_group, 1)
        else:
            x, weights = copy_to_group(x, self.tensor_group), copy_to_group(weights, self.tensor_group)
        sorted_experts, permutation = chosen.flatten().sort(stable=True)  # [n k]
        experts = torch.arange(self.router.shape[0], device=x.device)
        ends = torch.searchsorted(sorted_experts, experts, right=True)  # [E]
        partial = self._experts(x.flatten(0, 1), weights.reshape(-1, 1), permutation, ends).view(x.shape)
        leave = (
            reduce_scatter_sequence(partial, self.tensor_group, 1)
            if self.sequence_parallel
            else reduce_from_group(partial, self.tensor_group)
        )
        return leave, self._routing(logits, probabilities, ends)

    def _experts(self, x: Tensor, weights: Tensor, permutation: Tensor, ends: Tensor) -> Tensor:
        """x [n, d], weights [n k, 1] -> [n, d], which is to be summed over the tensor group.

        permutation [n k]: the choices, sorted by expert. ends [E]: where each expert's choices end in it.
        """
        k = self.rule.experts_per_token
        inverse = torch.empty_like(permutation)
        inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
        dispatched = _Dispatch.apply(x, permutation, inverse, k)  # [n k, d]
        gate_up = [grouped_linear(dispatched, weight, ends) for weight in (self.experts_gate, self.experts_up)]
        inner = self.kernels.swiglu(torch.cat(gate_up, dim=-1))  # [n k, f_shard]
        # Here a choice has f_shard values; behind the last product it has d.
        inner = inner * _Dispatch.apply(weights, permutation, inverse, 1)
        out: Tensor = _Combine.apply(grouped_linear(inner, self.experts_down, ends), permutation, inverse, k)
        return out

    def _routing(self, logits: Tensor, probabilities: Tensor, ends: Tensor) -> Routing:
        own_counts = ends.diff(prepend=ends.new_zeros(1)).float()
        counts = reduce_from_group(own_counts, self.context_group)
        shares = counts / counts.sum()
        balance = shares.numel() * torch.dot(shares, probabilities.flatten(0, 1).sum(0))
        loss, sums = self.rule.balance_weight * balance, [balance.detach()]
        if self.rule.z_weight > 0.0:
            z = logits.logsumexp(dim=-1).square().sum()
            loss = loss + self.rule.z_weight * z
            sums.append(z.detach())
        return Routing(loss, torch.cat([own_counts, torch.stack(sums)]))

    def extra_repr(self) -> str:
        num_experts, f_shard, d = self.experts_gate.shape
        ranks = f"rank {group_rank(self.tensor_group)} of {group_size(self.tensor_group)}"
        return f"{num_experts} experts, {self.rule.experts_per_token} a token, {d} -> {f_shard} -> {d}, {ranks}"
