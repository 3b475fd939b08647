"""Distinct ids out, rows back, gradients out: the one exchange of a training step (contract C3).

Each row is owned by one rank. A rank sends the row ids that it looks up to their owners, once per step; the owners answer with
the rows; after the backward pass, the gradients of the rows go the way that the ids went, and the owners sum them. Nothing here
knows a model or an optimizer.

Shapes: N look-ups of a step, U distinct rows among them, R rows that all ranks request from this rank, r of them distinct, w
row width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.kernels.rows import DistinctIds, RowGradientSums, RowKernels
from overtok_megatron.ngram.row_space import RowFilter
from overtok_megatron.parallel.collectives import profiler_span

ReadRows = Callable[[Tensor], Tensor]  # local rows int64 [r] -> their values [r, w]


@dataclass(kw_only=True)
class Plan:
    """Which rows a step looks up, each once, and who owns them.

    slots: int64, of the shape of the ids: the index of each look-up's row among the `count` distinct ones. sorted_lookups
    int64 [N]: the look-ups ordered by slot (kernels.rows.DistinctIds). own_rows int64 [U]: the local row of each slot where
    one rank owns all rows; None where rows come from other ranks.
    """

    slots: Tensor
    sorted_lookups: Tensor
    count: int
    own_rows: Tensor | None = None


PlanT = TypeVar("PlanT", bound=Plan)


class Exchange(Protocol[PlanT]):
    """Moves rows and their gradients between the ranks that own rows and the ranks that look them up.

    All ranks must call every method but payload_bytes, also ranks that look nothing up. Every exchange has a type of plan of
    its own. gradient_dtype: the dtype in which gradients are sent; they are summed in float32.
    """

    gradient_dtype: torch.dtype

    def plan(self, ids: Tensor) -> PlanT:
        """Tell the owners which rows this rank looks up. ids: row ids, int64 of any shape."""

    def fetch(self, plan: PlanT, read: ReadRows) -> Tensor:
        """The plan's distinct rows [U, w], ascending by row id, in the dtype in which the owners' `read` gives them."""

    def refresh(self, plan: PlanT, rows: Tensor, touched: Tensor, read: ReadRows) -> None:
        """Bring rows [U, w] that `fetch` returned up to date, in place.

        touched [r] int64: this rank's local rows that have changed since, ascending.
        """

    def return_gradients(self, plan: PlanT, own: RowGradientSums) -> tuple[Tensor, RowGradientSums]:
        """Send the gradients of the U distinct rows to the owners, which sum what several ranks send for the same row.

        Gradients of rows that take no updates are not sent. Returns the touched local rows [r] int64, distinct and ascending,
        and their sums. Sums are taken in the order of the ranks, so they are deterministic.
        """

    def payload_bytes(self, plan: PlanT, row_bytes: int, grad_bytes: int) -> int:
        """Bytes that this rank sends to other ranks for a step: counts, ids, the rows that it serves, gradients."""


@dataclass(kw_only=True)
class FlatPlan(Plan):
    """unique [U] int64: the row ids that this rank looks up, ascending.

    send_counts[i]: how many of them go to rank i, which owns them. recv_counts[i]: how many rows rank i requests from here;
    requested_rows [R] int64: those rows, local, in the order of the ranks. Rows travel the other way.
    """

    unique: Tensor
    send_counts: list[int]
    recv_counts: list[int]
    requested_rows: Tensor
    distinct: DistinctIds | None = None  # kept by distinct_requests
    trained: "tuple[FlatPlan, Tensor] | None" = None  # kept by trained_part


class FlatExchange:
    """Every rank talks to every other.

    bounds: the first row id of each rank and the end, ascending. group: the ranks; None = one rank, which owns all rows.
    gradient_dtype: as in Exchange. trained_rows: which rows take updates; None = all.
    """

    def __init__(
        self,
        bounds: Sequence[int],
        group: dist.ProcessGroup | None,
        *,
        kernels: RowKernels | None = None,
        gradient_dtype: torch.dtype = torch.float32,
        trained_rows: RowFilter | None = None,
    ) -> None:
        self.bounds = tuple(bounds)
        self.trained_rows = trained_rows
        self.kernels = kernels or RowKernels()
        self.group = group
        self.gradient_dtype = gradient_dtype
        self.rank = 0 if group is None else dist.get_rank(group)
        self.first_row_id = self.bounds[self.rank]
        assert len(self.bounds) == 1 + (1 if group is None else dist.get_world_size(group))

    def plan(self, ids: Tensor) -> FlatPlan:
        """Two all-to-alls: counts, then ids."""
        unique, slots, sorted_lookups = self.kernels.unique(ids, self.bounds[-1])
        count = unique.numel()
        if self.group is None:
            own_rows = unique - self.first_row_id if self.first_row_id else unique
            return FlatPlan(
                slots=slots,
                sorted_lookups=sorted_lookups,
                count=count,
                own_rows=own_rows,
                unique=unique,
                send_counts=[count],
                recv_counts=[count],
                requested_rows=own_rows,
            )
        edges = torch.searchsorted(unique, torch.tensor(self.bounds, device=unique.device))
        counts = edges.diff()  # [ranks]
        send_counts, recv_counts = counts.tolist(), self._all_to_all("counts", counts, None, None).tolist()
        requested = self._all_to_all("ids", unique, recv_counts, send_counts)
        return FlatPlan(
            slots=slots,
            sorted_lookups=sorted_lookups,
            count=count,
            unique=unique,
            send_counts=send_counts,
            recv_counts=recv_counts,
            requested_rows=requested - self.first_row_id,
        )

    def fetch(self, plan: FlatPlan, read: ReadRows) -> Tensor:
        """One all-to-all."""
        values = read(plan.requested_rows)  # [R, w]
        return values if self.group is None else self._all_to_all("rows", values, plan.send_counts, plan.recv_counts)

    def refresh(self, plan: FlatPlan, rows: Tensor, touched: Tensor, read: ReadRows) -> None:
        """Three small all-to-alls: how many of each rank's rows changed, which ones, and their values."""
        stale = is_in(plan.requested_rows, touched)
        self.resend(plan, rows, stale, lambda requests: read(plan.requested_rows[requests]))

    def resend(self, plan: FlatPlan, rows: Tensor, stale: Tensor, read_requests: ReadRows) -> Tensor:
        """Send again those of the R requested rows that are stale, bool [R], and put them into `rows` of their requesters.

        read_requests: indices into requested_rows -> values. Returns the indices of the rows that were renewed here, int64.
        """
        requests = stale.nonzero().squeeze(1)
        values = read_requests(requests)
        if self.group is None:
            rows.index_copy_(0, requests, values)
            return requests
        starts = torch.tensor([0, *plan.recv_counts], device=requests.device).cumsum(0)
        counts = torch.searchsorted(requests, starts).diff()  # [ranks], stale rows of those that each rank requested
        incoming = self._all_to_all("changed counts", counts, None, None)
        send_counts, recv_counts = counts.tolist(), incoming.tolist()
        offsets = requests - torch.repeat_interleave(starts[:-1], counts)  # among what one rank requested
        renewed = self._all_to_all("changed rows' indices", offsets, recv_counts, send_counts)
        own_starts = torch.tensor([0, *plan.send_counts[:-1]], device=renewed.device).cumsum(0)
        renewed = renewed + torch.repeat_interleave(own_starts, incoming)  # index into `unique`
        rows.index_copy_(0, renewed, self._all_to_all("changed rows", values, recv_counts, send_counts))
        return renewed

    def return_gradients(self, plan: FlatPlan, own: RowGradientSums) -> tuple[Tensor, RowGradientSums]:
        """One all-to-all."""
        plan, kept = self.trained_part(plan)
        return self.send_gradients(plan, own if kept is None else RowGradientSums(own.total[kept], own.squares[kept]))

    def trained_part(self, plan: FlatPlan) -> tuple[FlatPlan, Tensor | None]:
        """The plan of the rows whose gradients are sent, and which of the U rows those are, bool [U]; None = all.

        The requesting and the owning rank each compute it from what they know already, without communication.
        """
        if self.trained_rows is None:
            return plan, None
        if plan.trained is None:
            kept = self.trained_rows(plan.unique)
            kept_requests = self.trained_rows(plan.requested_rows + self.first_row_id)
            unique = plan.unique[kept]
            part = FlatPlan(
                slots=plan.slots,
                sorted_lookups=plan.sorted_lookups,
                count=unique.numel(),
                unique=unique,
                send_counts=_kept_counts(kept, plan.send_counts),
                recv_counts=_kept_counts(kept_requests, plan.recv_counts),
                requested_rows=plan.requested_rows[kept_requests],
            )
            plan.trained = part, kept
        return plan.trained

    def send_gradients(self, plan: FlatPlan, own: RowGradientSums) -> tuple[Tensor, RowGradientSums]:
        """return_gradients for a plan all of whose rows take updates."""
        if self.group is None:
            return plan.requested_rows, own
        gradients = own.total.to(self.gradient_dtype)
        received = self._all_to_all("gradients", gradients, plan.recv_counts, plan.send_counts)  # [R, w]
        requests = self.distinct_requests(plan)
        sums = RowGradientSums.empty(requests.ids.numel(), received.shape[1], received.device)
        self.kernels.add(sums, requests.sorted_lookups, received, fresh=True)  # each row's gradients are in rank order
        return requests.ids, sums

    def distinct_requests(self, plan: FlatPlan) -> DistinctIds:
        """The distinct ones among the R requested rows: their `ids` are local rows."""
        if plan.distinct is None:
            num_rows = self.bounds[self.rank + 1] - self.first_row_id
            plan.distinct = self.kernels.unique(plan.requested_rows, num_rows)
        return plan.distinct

    def payload_bytes(self, plan: FlatPlan, row_bytes: int, grad_bytes: int) -> int:
        trained, _ = self.trained_part(plan)
        ids, rows, gradients = (
            sum(counts) - counts[self.rank] for counts in (plan.send_counts, plan.recv_counts, trained.send_counts)
        )
        return 8 * (len(plan.send_counts) - 1) + ids * 8 + rows * row_bytes + gradients * grad_bytes

    def _all_to_all(
        self, what: str, values: Tensor, recv_counts: list[int] | None, send_counts: list[int] | None
    ) -> Tensor:
        """Counts None: as many values go to each rank as come from it."""
        shape = values.shape if recv_counts is None else (sum(recv_counts), *values.shape[1:])
        result = values.new_empty(shape)
        assert self.group is not None
        with profiler_span(f"all-to-all of {what}", self.group):
            dist.all_to_all_single(result, values.contiguous(), recv_counts, send_counts, group=self.group)
        return result


def _kept_counts(kept: Tensor, counts: list[int]) -> list[int]:
    """How many of each rank's rows are kept: kept bool [R] has counts[i] values of rank i, in the order of the ranks."""
    return torch.stack([part.sum() for part in kept.split(counts)]).tolist()


def is_in(values: Tensor, ascending: Tensor) -> Tensor:
    """Which of values [n] are among `ascending` [r], bool [n]."""
    if ascending.numel() == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    index = torch.searchsorted(ascending, values).clamp(max=ascending.numel() - 1)
    return ascending[index] == values
