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
ReadRequests = Callable[[Tensor], Tensor]  # indices int64 [n] into a plan's requested rows -> their values [n, w]


@dataclass(kw_only=True)
class Plan:
    """Which rows a step looks up, each once, and who owns them.

    slots: int64, of the shape of the ids: the index of each look-up's row among the `count` distinct ones. sorted_lookups
    int64 [N]: the look-ups ordered by slot (kernels.rows.DistinctIds). local_row_of_slot int64 [U]: where one rank owns all
    rows, the local row that each slot stands for; None where rows come from other ranks.
    """

    slots: Tensor
    sorted_lookups: Tensor
    count: int
    local_row_of_slot: Tensor | None = None


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

    def refresh(self, plan: PlanT, rows: Tensor, step_rows: Tensor, read: ReadRows) -> None:
        """Bring rows [U, w] that `fetch` returned up to date, in place.

        step_rows [r] int64: this rank's local rows that a step has updated since, ascending.
        """

    def send_gradients(self, plan: PlanT, lookup_gradients: RowGradientSums) -> tuple[Tensor, RowGradientSums]:
        """Send gradients of rows to the ranks that own the rows, which sum what several ranks send for the same row.

        lookup_gradients: of the plan's U distinct rows, each summed over the look-ups of this rank. Gradients of rows that
        take no updates are not sent. Returns the local rows of the step [r] int64, distinct and ascending: those of this
        rank that some rank sent a gradient for; and their sums, which are deterministic, because they are taken in the order
        of the ranks.
        """

    def payload_bytes(self, plan: PlanT, row_bytes: int, grad_bytes: int) -> int:
        """Bytes that this rank sends to other ranks for a step: counts, ids, the rows that it serves, gradients."""


@dataclass(kw_only=True)
class FlatPlan(Plan):
    """unique [U] int64: the row ids that this rank looks up, ascending.

    Both counts are those of the way to the owners, which ids and gradients take. send_counts[i]: how many of the U rows rank
    i owns, so that their ids go there. recv_counts[i]: how many rows rank i requests from here. requested_rows [R] int64:
    those rows, local, in the order of the ranks. Rows go the way back, from owners to requesters, where the two counts
    change places.
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
            local_row_of_slot = unique - self.first_row_id if self.first_row_id else unique
            return FlatPlan(
                slots=slots,
                sorted_lookups=sorted_lookups,
                count=count,
                local_row_of_slot=local_row_of_slot,
                unique=unique,
                send_counts=[count],
                recv_counts=[count],
                requested_rows=local_row_of_slot,
            )
        edges = torch.searchsorted(unique, torch.tensor(self.bounds, device=unique.device))
        counts = edges.diff()  # [ranks]
        send_counts, recv_counts = counts.tolist(), self._all_to_all("counts", counts).tolist()
        requested = self._all_to_all("ids", unique, send_counts=send_counts, recv_counts=recv_counts)
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
        if self.group is None:
            return values
        # the way back: this rank sends to each rank what that one requests, and receives what it requested itself
        return self._all_to_all("rows", values, send_counts=plan.recv_counts, recv_counts=plan.send_counts)

    def refresh(self, plan: FlatPlan, rows: Tensor, step_rows: Tensor, read: ReadRows) -> None:
        """Three small all-to-alls: how many of each rank's rows changed, which ones, and their values."""
        stale = is_in(plan.requested_rows, step_rows)
        self.resend(plan, rows, stale, lambda requests: read(plan.requested_rows[requests]))

    def resend(self, plan: FlatPlan, rows: Tensor, stale: Tensor, read_requests: ReadRequests) -> Tensor:
        """Send again those of the R requested rows that are stale, bool [R], and put them into `rows` of their requesters.

        Returns the indices of the rows that were renewed here, int64.
        """
        requests = stale.nonzero().squeeze(1)
        values = read_requests(requests)
        if self.group is None:
            rows.index_copy_(0, requests, values)
            return requests
        starts = torch.tensor([0, *plan.recv_counts], device=requests.device).cumsum(0)
        counts = torch.searchsorted(requests, starts).diff()  # [ranks], stale rows of those that each rank requested
        incoming = self._all_to_all("changed counts", counts)
        # of the stale rows alone and of the way back, from owners to requesters
        send_counts, recv_counts = counts.tolist(), incoming.tolist()
        offsets = requests - torch.repeat_interleave(starts[:-1], counts)  # among what one rank requested
        renewed = self._all_to_all("changed rows' indices", offsets, send_counts=send_counts, recv_counts=recv_counts)
        unique_starts = torch.tensor([0, *plan.send_counts[:-1]], device=renewed.device).cumsum(0)
        renewed = renewed + torch.repeat_interleave(unique_starts, incoming)  # index into `unique`
        values = self._all_to_all("changed rows", values, send_counts=send_counts, recv_counts=recv_counts)
        rows.index_copy_(0, renewed, values)
        return renewed

    def send_gradients(self, plan: FlatPlan, lookup_gradients: RowGradientSums) -> tuple[Tensor, RowGradientSums]:
        """One all-to-all."""
        plan, kept = self.trained_part(plan)
        if kept is not None:
            lookup_gradients = RowGradientSums(*(part[kept] for part in lookup_gradients))
        return self.send_all_gradients(plan, lookup_gradients)

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

    def send_all_gradients(self, plan: FlatPlan, lookup_gradients: RowGradientSums) -> tuple[Tensor, RowGradientSums]:
        """As `send_gradients`, for a plan all of whose rows take updates."""
        if self.group is None:
            return plan.requested_rows, lookup_gradients
        received = self._all_to_all(  # [R, w]
            "gradients",
            lookup_gradients.total.to(self.gradient_dtype),
            send_counts=plan.send_counts,
            recv_counts=plan.recv_counts,
        )
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
        # what goes to each rank: ids and gradients to owners, rows to requesters
        ids, rows, gradients = (
            sum(counts) - counts[self.rank] for counts in (plan.send_counts, plan.recv_counts, trained.send_counts)
        )
        return 8 * (len(plan.send_counts) - 1) + ids * 8 + rows * row_bytes + gradients * grad_bytes

    def _all_to_all(
        self,
        what: str,
        values: Tensor,
        *,
        send_counts: list[int] | None = None,
        recv_counts: list[int] | None = None,
    ) -> Tensor:
        """How many of the values go to each rank, and come from each; None for both: as many go to each as come from it."""
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
