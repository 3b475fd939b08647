"""The rows of one step on the rank that looks them up: forward passes gather from them, backward passes add gradients to them.

Neither communicates (contract C3): the rows were fetched before, and their gradients are sent to the owners after the last
backward pass (sharded_tables.py).

Shapes: N look-ups of a step, U distinct rows among them, T tables, w row width.
"""

from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor

from overtok_megatron.kernels.rows import RowGradientSums, RowKernels, StoredRows
from overtok_megatron.ngram.exchange import PlanT


@dataclass(kw_only=True)
class DistinctRows(Generic[PlanT]):
    """The distinct rows of a step, each once, with the buffer in which their gradients are summed.

    The row of slot i is row `index[i]` of `stored`, or row i without an index. plan: which rank owns which of them.
    sorted_lookups int64 [N]: all look-ups of the step, ordered by slot (kernels.rows.DistinctIds); None where no gradients
    are wanted. dtype: of gathered rows, which is the model's.
    """

    stored: StoredRows
    index: Tensor | None
    plan: PlanT
    sorted_lookups: Tensor | None
    dtype: torch.dtype
    kernels: RowKernels

    def __post_init__(self) -> None:
        # Autograd calls a backward function only where an input requires a gradient. Rows are not leaves of the graph.
        self.autograd_anchor = torch.empty(0, requires_grad=self.sorted_lookups is not None)
        self._sums: RowGradientSums | None = None

    @property
    def count(self) -> int:
        """U."""
        return self.plan.count

    def without_gradients(self) -> None:
        """Let no backward pass reach these rows, so that none runs through what is computed from them alone."""
        self.autograd_anchor.requires_grad_(False)

    def sort_lookups(self, slots: Tensor) -> Tensor | None:
        """sorted_lookups of one micro-batch with slots int64 of any shape; those of the step where it has no other."""
        if self.sorted_lookups is None or slots.numel() == self.sorted_lookups.numel():
            return self.sorted_lookups
        return self.kernels.sort_lookups(slots, self.count)

    def add_gradients(self, sorted_lookups: Tensor, grad: Tensor) -> None:
        """Add the gradients [n, w] of n look-ups, in the order of the look-ups, to their rows. sorted_lookups [n]: of these."""
        fresh = self._sums is None
        if self._sums is None:
            self._sums = RowGradientSums.empty(self.count, grad.shape[-1], grad.device)
        self.kernels.add(self._sums, sorted_lookups, grad, fresh=fresh)

    def gradients(self, device: torch.device) -> RowGradientSums:
        """The gradients [U, w] float32 of all micro-batches so far; zeros on `device` where there was no backward pass."""
        if self._sums is None:
            count, width = self.count, self.stored.weight.shape[1]
            return RowGradientSums(torch.zeros(count, width, device=device), torch.zeros(count, device=device))
        return self._sums


class _GatherRows(torch.autograd.Function):
    """Forward: rows[slots]. Backward: adds the gradient to the buffer of `rows`; the anchor receives no gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: DistinctRows, slots: Tensor) -> Tensor:
        ctx.rows, ctx.sorted_lookups = rows, rows.sort_lookups(slots)
        return rows.kernels.gather(rows.stored, rows.index, slots, rows.dtype, ctx.sorted_lookups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        assert ctx.sorted_lookups is not None, "backward through rows that were fetched without a gradient"
        ctx.rows.add_gradients(ctx.sorted_lookups, grad.reshape(-1, grad.shape[-1]))
        return None, None, None


@dataclass(frozen=True)
class FetchedRows(Generic[PlanT]):
    """What `ShardedTables.fetch_rows` returns and a forward pass takes: look-ups, and the rows that they name.

    slots: int64 [.., s, T], indices into `rows`; the leading axes are those of the tokens that were looked up. All
    micro-batches of a step share `rows`.
    """

    slots: Tensor
    rows: DistinctRows[PlanT]

    def __getitem__(self, micro_batch: int) -> "FetchedRows[PlanT]":
        """The look-ups of one entry of the first axis."""
        return FetchedRows(self.slots[micro_batch], self.rows)

    def positions(self, start: int, count: int) -> "FetchedRows[PlanT]":
        """The look-ups of `count` of the s positions, from position `start` on."""
        return FetchedRows(self.slots.narrow(-2, start, count).contiguous(), self.rows)

    def gather(self) -> Tensor:
        """The rows [.., s, T, w] in the model's dtype; the backward pass adds to the gradients of `rows`."""
        gathered: Tensor = _GatherRows.apply(self.rows.autograd_anchor, self.rows, self.slots)
        return gathered
