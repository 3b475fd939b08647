"""A mixture of SwiGLU experts without capacity limits: every token reaches every expert that it chose.

Shapes: b, s (s_shard a slice under sequence parallelism), d hidden, E experts, k experts a token, n = b s tokens,
f intermediate size of an expert (f_shard this rank's part: tensor parallelism splits every expert). The router is whole on
every rank; where positions are split each rank routes its own, and what it chose is gathered with them.

The router's own loss has two parts, each a sum over positions and averaged over the layers by its weight:
balance: E sum_e f_e p_e, with f_e the share of the micro-batch's choices that went to e, all positions of all context- and
tensor-parallel ranks counted, and p_e the router's probability (arXiv 2409.02060, eq. 4; 1 where all experts are chosen
alike; transformers' load_balancing_loss_func of one layer, over k). f_e has no gradient, and counts one micro-batch of one
data-parallel rank: the run's loss is the mean over micro-batches and ranks, each with shares of its own.
z: log(sum exp logits)^2 (eq. 5).

Beside its loss a router returns statistics of what it did, [F], detached float32, for whoever reports them: how often it chose
each of the E experts, the sum over its positions of balance, and where z has a weight that of z. They are an output like any
other, not a counter in the module, so that a layer that backward computes again counts once.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.kernels.grouped import grouped_linear
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
    """| forward | x[order // k] | backward | sum over k of g[inverse] | : no two threads add into one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """| forward | sum over k of y[inverse] | backward | g[order // k] | : the conjugate of _Dispatch."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return y[inverse].view(-1, k, y.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order // ctx.k], None, None, None


class Routing(NamedTuple):
    """What routers report. loss: weighted, summed over this rank's positions, with gradient, float32. stats: float32, [F] of
    one router or [layers, F] of several."""

    loss: Tensor
    stats: Tensor


class MixtureOfExperts(nn.Module):
    """[b, s_shard, d] -> ([b, s_shard, d], what the router reports of these positions).

    router [E, d]; experts_gate, experts_up [E, f_shard, d]; experts_down [E, d, f_shard]. normalize_weights: a token's
    weights sum to 1. balance_weight, z_weight: of the two parts of the router's loss.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        per_token: int,
        normalize_weights: bool,
        balance_weight: float,
        z_weight: float,
        kernels: Kernels,
        group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.per_token = per_token
        self.normalize_weights = normalize_weights
        self.balance_weight = balance_weight
        self.z_weight = z_weight
        self.kernels = kernels
        self.group = group
        self.context_group = context_group
        self.sequence_parallel = sequence_parallel
        start, stop = split_range(intermediate_size, group_size(group), group_rank(group))
        d, f, f_shard = hidden_size, intermediate_size, stop - start
        self.router = nn.Parameter(torch.empty(num_experts, d))
        self.experts_gate = nn.Parameter(torch.empty(num_experts, f_shard, d))
        self.experts_up = nn.Parameter(torch.empty(num_experts, f_shard, d))
        self.experts_down = nn.Parameter(torch.empty(num_experts, d, f_shard))
        mark_split(self.experts_gate, dim=1, full_shape=(num_experts, f, d), group=group)
        mark_split(self.experts_up, dim=1, full_shape=(num_experts, f, d), group=group)
        mark_split(self.experts_down, dim=2, full_shape=(num_experts, d, f), group=group)

    def reset(self, seed: int, name: str, std: float) -> None:
        for own_name, weight in self.named_parameters():
            initialise(weight, std, seed, f"{name}.{own_name}")

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        split = self.group if self.sequence_parallel else None  # over whose ranks positions are split
        logits = F.linear(x, copy_to_group(self.router, split)).float()  # [b, s_shard, E]
        probabilities = logits.softmax(dim=-1)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)  # [b, s_shard, k]
        if self.normalize_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        if self.sequence_parallel:
            x, weights = all_gather_sequence(x, self.group, 1), all_gather_sequence(weights, self.group, 1)
            chosen = gather_from_group(chosen, self.group, 1)
        else:
            x, weights = copy_to_group(x, self.group), copy_to_group(weights, self.group)
        by_expert, order = chosen.flatten().sort(stable=True)  # [n k]
        experts = torch.arange(self.router.shape[0], device=x.device)
        ends = torch.searchsorted(by_expert, experts, right=True)  # [E]
        out = self._experts(x.flatten(0, 1), weights.reshape(-1, 1), order, ends).view(x.shape)
        leave = (
            reduce_scatter_sequence(out, self.group, 1)
            if self.sequence_parallel
            else reduce_from_group(out, self.group)
        )
        return leave, self._routing(logits, probabilities, ends)

    def _experts(self, x: Tensor, weights: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        """x [n, d], weights [n k, 1] -> [n, d], this rank's part of a sum. order [n k]: which choice comes where."""
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        rows = _Dispatch.apply(x, order, inverse, self.per_token)  # [n k, d]
        gate_up = [grouped_linear(rows, weight, ends) for weight in (self.experts_gate, self.experts_up)]
        inner = self.kernels.swiglu(torch.cat(gate_up, dim=-1))  # [n k, f_shard]
        inner = inner * _Dispatch.apply(weights, order, inverse, 1)  # narrower here than behind the last product
        out: Tensor = _Combine.apply(grouped_linear(inner, self.experts_down, ends), order, inverse, self.per_token)
        return out

    def _routing(self, logits: Tensor, probabilities: Tensor, ends: Tensor) -> Routing:
        own_counts = ends.diff(prepend=ends.new_zeros(1)).float()
        counts = reduce_from_group(own_counts, self.context_group)
        shares = counts / counts.sum()
        balance = shares.numel() * torch.dot(shares, probabilities.flatten(0, 1).sum(0))
        loss, sums = self.balance_weight * balance, [balance.detach()]
        if self.z_weight > 0.0:
            z = logits.logsumexp(dim=-1).square().sum()
            loss = loss + self.z_weight * z
            sums.append(z.detach())
        return Routing(loss, torch.cat([own_counts, torch.stack(sums)]))

    def extra_repr(self) -> str:
        num_experts, f_shard, d = self.experts_gate.shape
        place = f"rank {group_rank(self.group)} of {group_size(self.group)}"
        return f"{num_experts} experts, {self.per_token} a token, {d} -> {f_shard} -> {d}, {place}"
