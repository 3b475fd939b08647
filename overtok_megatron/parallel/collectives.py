"""Differentiable collectives in conjugate pairs. Each is out of place, and for group None the identity.

Beside them is `all_reduce_in_place`, which autograd does not record. Names and times of collectives: spans.py.

Sums run in the tensor's own dtype. Notation in the tables: x_r is rank r's tensor, g_r the gradient that arrives there.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.parallel.spans import profiler_span

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def all_reduce_in_place(values: Tensor, group: Group, *, of: str, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce `values` over the ranks of a group, outside autograd; for group None they stay. of: what they are, for traces."""
    if group is not None:
        with profiler_span(f"all-reduce of {of}", group):
            dist.all_reduce(values, op=op, group=group)


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with profiler_span("all-reduce", group):
        dist.all_reduce(total, group=group)
    return total


def _gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    with profiler_span("all-gather", group):
        dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def _slices(x: Tensor, group: dist.ProcessGroup, dim: int) -> tuple[Tensor, ...]:
    size, ranks = x.shape[dim], dist.get_world_size(group)
    # chunk() may return fewer or unequal slices; collectives then hang or return garbage
    assert size % ranks == 0, f"dimension {dim} of {tuple(x.shape)} does not divide over {ranks} ranks"
    return x.chunk(ranks, dim=dim)


def _own_slice(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    return _slices(x, group, dim)[dist.get_rank(group)].contiguous()


def _sum_slices(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = [part.contiguous() for part in _slices(x, group, dim)]
    total = torch.empty_like(parts[0])
    with profiler_span("reduce-scatter", group):
        dist.reduce_scatter(total, parts, group=group)
    return total


def _all_to_all(x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
    parts = torch.stack(_slices(x, group, split))  # [ranks, ...]
    received = torch.empty_like(parts)
    with profiler_span("all-to-all", group):
        dist.all_to_all_single(received, parts, group=group)
    return torch.cat(received.unbind(), dim=join)


class _Copy(torch.autograd.Function):
    """| forward | x | backward | sum_r g_r | : x is the same on all ranks, and each uses it differently."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    """| forward | sum_r x_r | backward | g | : all ranks use the sum in the same way, so g is the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """| forward | cat_r x_r | backward | own slice of g, or of sum_r g_r | : the sum if ranks use it differently."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int, sum_grads: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.sum_grads = group, dim, sum_grads
        return _gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = _sum_slices if ctx.sum_grads else _own_slice
        return back(grad, ctx.group, ctx.dim), None, None, None


class _Split(torch.autograd.Function):
    """| forward | own slice of x | backward | cat_r g_r | : x is the same on all ranks, and its gradient is to be so too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _own_slice(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.group, ctx.dim), None, None


class _ReduceScatter(torch.autograd.Function):
    """| forward | own slice of sum_r x_r | backward | cat_r g_r |"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _sum_slices(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.group, ctx.dim), None, None


class _ExchangeDims(torch.autograd.Function):
    """| forward | split along `split`, joined along `join` | backward | the same with both dimensions swapped |"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        return _all_to_all(x, group, split, join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.group, ctx.join, ctx.split), None, None, None


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Enter a split region: identity forward, gradients summed over the group."""
    return x if group is None else _Copy.apply(x, group)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Leave a split region: partial results summed forward, identity backward."""
    return x if group is None else _Reduce.apply(x, group)


def gather_from_group(x: Tensor, group: Group, dim: int) -> Tensor:
    """Join slices along `dim` on every rank. All ranks must use the result in the same way: backward takes the own slice."""
    return x if group is None else _Gather.apply(x, group, dim, False)


def split_over_group(x: Tensor, group: Group, dim: int) -> Tensor:
    """The own slice along `dim` of what is the same on all ranks; backward gathers. The conjugate of `gather_from_group`.

    `dim` must divide.
    """
    return x if group is None else _Split.apply(x, group, dim)


def all_gather_sequence(x: Tensor, group: Group, dim: int) -> Tensor:
    """Enter a split region from sequence slices: all-gather forward, reduce-scatter backward."""
    return x if group is None else _Gather.apply(x, group, dim, True)


def reduce_scatter_sequence(x: Tensor, group: Group, dim: int) -> Tensor:
    """Leave a split region into sequence slices: reduce-scatter forward, all-gather backward. `dim` must divide."""
    return x if group is None else _ReduceScatter.apply(x, group, dim)


def exchange_dims(x: Tensor, group: Group, *, split: int, join: int) -> Tensor:
    """Turn slices of dimension `join` into slices of dimension `split`, by one all-to-all.

    DeepSpeed-Ulysses does this before and after attention, with heads and sequence (arXiv 2309.14509). `split` must divide.
    """
    return x if group is None else _ExchangeDims.apply(x, group, split, join)
