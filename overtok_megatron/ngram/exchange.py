"""Unique ids out, rows back, gradients out: the one exchange of a step (contract C3). Knows no model and no optimizer.

Shapes: N ids asked for, U of them distinct, R rows asked of this rank by all ranks, r of them distinct, w row width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.parallel.collectives import named


@dataclass(frozen=True)
class ExchangePlan:
    """Who asks whom for what in one step.

    unique [U] int64 ascending global rows; slots [*ids.shape] int64, each id's place in `unique`; sent[i] rows asked
    of rank i; received[i] rows that rank i asks here; asked [R] int64, those rows, local to this rank's shard.
    """

    unique: Tensor
    slots: Tensor
    sent: list[int]
    received: list[int]
    asked: Tensor


class RowExchange:
    """Moves rows and gradients between their owners and the ranks that use them.

    bounds: first row of each rank and the end (`sizing.row_bounds`). group: the table group; None = one rank.
    Every method is a collective of the group: all ranks call it, also those with nothing to ask.
    """

    def __init__(
        self, bounds: Sequence[int], group: dist.ProcessGroup | None, kernels: RowKernels | None = None
    ) -> None:
        self.bounds = tuple(bounds)
        self.kernels = kernels or RowKernels()
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        assert len(self.bounds) == 1 + (1 if group is None else dist.get_world_size(group))

    def plan(self, ids: Tensor) -> ExchangePlan:
        """ids: int64 of any shape, global rows. Two all-to-alls: counts, then ids."""
        unique, slots = self.kernels.unique(ids, self.bounds[-1])
        if self.group is None:
            return ExchangePlan(unique, slots, [unique.numel()], [unique.numel()], unique)
        edges = torch.searchsorted(unique, torch.tensor(self.bounds, device=unique.device))
        counts = edges.diff()  # [ranks]
        their_counts = torch.empty_like(counts)
        with named("all-to-all of counts", self.group):
            dist.all_to_all_single(their_counts, counts, group=self.group)
        sent, received = counts.tolist(), their_counts.tolist()
        asked = unique.new_empty(sum(received))
        with named("all-to-all of ids", self.group):
            dist.all_to_all_single(asked, unique, received, sent, group=self.group)
        return ExchangePlan(unique, slots, sent, received, asked - self.bounds[self.rank])

    def fetch(self, plan: ExchangePlan, weight: Tensor) -> Tensor:
        """The plan's unique rows [U, w], from every owner's `weight` [rows, w]. One all-to-all."""
        answer = weight.index_select(0, plan.asked)  # [R, w]
        if self.group is None:
            return answer
        rows = weight.new_empty(plan.unique.numel(), weight.shape[1])
        with named("all-to-all of rows", self.group):
            dist.all_to_all_single(rows, answer, plan.sent, plan.received, group=self.group)
        return rows

    def return_gradients(self, plan: ExchangePlan, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the unique rows [U, w] to the owners, where what several ranks send for a row is summed.

        Returns the touched local rows [r] int64, distinct and ascending, and their summed gradients [r, w]. The sum
        runs in rank order, so that it is the same at every run. One all-to-all.
        """
        if self.group is None:
            return plan.asked, grad
        inbox = grad.new_empty(plan.asked.numel(), grad.shape[1])
        with named("all-to-all of gradients", self.group):
            dist.all_to_all_single(inbox, grad, plan.received, plan.sent, group=self.group)
        rows, place = self.kernels.unique(plan.asked, self.bounds[self.rank + 1] - self.bounds[self.rank])
        total = grad.new_zeros(rows.numel(), grad.shape[1])
        begin = 0
        for count in plan.received:  # one rank's rows are distinct, so each add is free of duplicates
            end = begin + count
            self.kernels.add(total, place[begin:end], inbox[begin:end])
            begin = end
        return rows, total

    def payload_bytes(self, plan: ExchangePlan, row_bytes: int) -> int:
        """Bytes that this rank sends to other ranks in a whole step: ids, rows that it serves, gradients."""
        asks = sum(plan.sent) - plan.sent[self.rank]
        serves = sum(plan.received) - plan.received[self.rank]
        return 8 * (len(plan.sent) - 1) + asks * (8 + row_bytes) + serves * row_bytes
