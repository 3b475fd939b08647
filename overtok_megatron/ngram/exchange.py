"""Distinct ids out, rows back, gradients out: the one exchange of a training step (contract C3).

Each row is owned by one rank. A rank sends the row ids that it looks up to their owners, once per step; the owners answer with
the rows; after the backward pass, the gradients of the rows go the way that the ids went, and the owners sum them. Nothing here
knows a model or an optimizer, nor on which thread it runs (prefetch.py).

Shapes: N look-ups of a step, U distinct rows among them, R rows that all ranks request from this rank, r of them distinct, w
row width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.kernels.rows import RowGradientSums, RowKernels
from overtok_megatron.ngram.row_space import RowFilter
from overtok_megatron.parallel.spans import profiler_span, wait_for

ReadRows = Callable[[Tensor], Tensor]  # local rows int64 [r] -> their values [r, w]
Fetching = Callable[
    [], Tensor
]  # to be called once: returns rows under way; on a GPU the stream waits for them, not the host


@dataclass(kw_only=True)
class Plan(ABC):
    """Which rows a step looks up, each once, and who owns them.

    slots: int64, of the shape of the ids: the index of each look-up's row among the `count` distinct ones. sorted_lookups
    int64 [N]: the look-ups ordered by slot (kernels.rows.DistinctIds). local_row_of_slot int64 [U]: where one rank owns all
    rows, the local row that each slot stands for; None where rows come from other ranks.
    """

    slots: Tensor
    sorted_lookups: Tensor
    count: int
    local_row_of_slot: Tensor | None = None

    @property
    @abstractmethod
    def step_rows(self) -> Tensor:
        """The local rows of this rank that the step will update, int64 [r], ascending: those that get a gradient."""


PlanT = TypeVar("PlanT", bound=Plan)


class Exchange(Protocol[PlanT]):
    """Moves rows and their gradients between the ranks that own rows and the ranks that look them up.

    All ranks must call every method but payload_bytes, also ranks that look nothing up. Every exchange has a type of plan of
    its own; another exchange of that type between the same owners may go on with the plan. gradient_dtype: the dtype in
    which gradients are sent; they are summed in float32.
    """

    gradient_dtype: torch.dtype

    def plan(self, ids: Tensor, *, training: bool = True) -> PlanT:
        """Tell the owners which rows this rank looks up. ids: row ids, int64 of any shape.

        training: prepare the way back of the gradients as well. Nothing else has to be told about a step: `start_fetch` and
        `send_gradients` then know every size and every index.
        """

    def start_fetch(self, plan: PlanT, read: ReadRows) -> Fetching:
        """Read rows of this rank, and begin to send them to the ranks that look them up.

        Returns a function that waits for the plan's distinct rows [U, w], ascending by row id, in the dtype in which the
        owners' `read` gives them.
        """

    def tell_changes(self, plan: PlanT, changing: RowFilter) -> None:
        """Tell the ranks that look rows up which of them will change between `start_fetch` and their use.

        changing: local rows int64 [..] -> bool [..].
        """

    def fetch_changed(self, plan: PlanT, read: ReadRows) -> tuple[Tensor, Tensor]:
        """The slots int64 [c] of the rows that `tell_changes` named on any rank, and their values [c, w] now."""

    def send_gradients(self, plan: PlanT, lookup_gradients: RowGradientSums) -> tuple[Tensor, RowGradientSums]:
        """Send gradients of rows to the ranks that own the rows, which sum what several ranks send for the same row.

        lookup_gradients: of the plan's U distinct rows, each summed over the look-ups of this rank. Gradients of rows that
        take no updates are not sent. Returns the local rows of the step [r] int64, distinct and ascending: those of this
        rank that some rank sent a gradient for; and their sums, which are deterministic, because they are taken in the order
        of the ranks.
        """

    def payload_bytes(self, plan: PlanT, row_bytes: int, grad_bytes: int) -> int:
        """Bytes that this rank sends to other ranks for a step: a count for each, ids, the rows that it serves, gradients.

        What pads a message of ids to the size of the others is not counted, nor are rows that are sent again.
        """


@dataclass(kw_only=True)
class GradientPlan:
    """The way of gradients to the owners of the rows. Frozen rows get none.

    kept int64 [K]: which of the U rows have gradients that are sent; None = all. send_counts, recv_counts: as those of
    FlatPlan, of these rows alone. local_rows int64 [r]: the distinct rows of this rank that gradients arrive for, ascending.
    sorted_arrivals int64: the gradients that arrive ordered by their index in local_rows (kernels.rows.DistinctIds); None
    where one rank owns all rows, because they are in that order already.
    """

    kept: Tensor | None
    send_counts: list[int]
    recv_counts: list[int]
    local_rows: Tensor
    sorted_arrivals: Tensor | None


@dataclass(kw_only=True)
class Changes:
    """Rows of a plan that change after they were fetched.

    requests int64: which of the R requested rows, for send_counts[i] of which the values go to rank i. slots int64: which of
    the U rows of this rank, for recv_counts[i] of which the values come from rank i.
    """

    requests: Tensor
    slots: Tensor
    send_counts: list[int]
    recv_counts: list[int]


@dataclass(kw_only=True)
class FlatPlan(Plan):
    """Both counts are those of the way to the owners, which ids and gradients take. send_counts[i]: how many of the U rows
    rank i owns, so that their ids go there. recv_counts[i]: how many rows rank i requests from here. requested_rows [R]
    int64: those rows, local, in the order of the ranks. Rows go the way back, from owners to requesters, where the two
    counts change places. gradients: None where the rows get no gradients. changes: None where no rows change.
    """

    send_counts: list[int]
    recv_counts: list[int]
    requested_rows: Tensor
    gradients: GradientPlan | None = None
    changes: Changes | None = None

    @property
    def step_rows(self) -> Tensor:
        assert self.gradients is not None, "a plan without gradients"
        return self.gradients.local_rows


class FlatExchange:
    """Every rank talks to every other.

    bounds: the first row id of each rank and the end, ascending. group: the ranks; None = one rank, which owns all rows.
    gradient_dtype: as in Exchange. trained_rows: which rows take updates; None = all. pin_rows: fetched rows land in pinned
    memory of the host.
    """

    def __init__(
        self,
        bounds: Sequence[int],
        group: dist.ProcessGroup | None,
        *,
        kernels: RowKernels | None = None,
        gradient_dtype: torch.dtype = torch.float32,
        trained_rows: RowFilter | None = None,
        pin_rows: bool = False,
    ) -> None:
        self.bounds = tuple(bounds)
        self.trained_rows = trained_rows
        self.kernels = kernels or RowKernels()
        self.group = group
        self.gradient_dtype = gradient_dtype
        self.pin_rows = pin_rows
        self.rank = 0 if group is None else dist.get_rank(group)
        self.first_row_id = self.bounds[self.rank]
        assert len(self.bounds) == 1 + (1 if group is None else dist.get_world_size(group))
        self._capacity = 0  # ids for each rank that fit the first message of a plan; the same on all ranks

    @property
    def num_rows(self) -> int:
        """How many rows this rank owns."""
        return self.bounds[self.rank + 1] - self.first_row_id

    def plan(self, ids: Tensor, *, training: bool = True) -> FlatPlan:
        """One all-to-all of counts and ids; a second one where a step looks up more rows than any step before."""
        unique, slots, sorted_lookups = self.kernels.unique(ids, self.bounds[-1])
        return self.plan_distinct(unique, slots, sorted_lookups, training=training)

    def plan_distinct(self, unique: Tensor, slots: Tensor, sorted_lookups: Tensor, *, training: bool) -> FlatPlan:
        """As `plan`, from ids that are distinct and ascending already, int64 [U]."""
        if self.group is None:
            requested_rows = unique - self.first_row_id if self.first_row_id else unique
            local_row_of_slot, send_counts, recv_counts = requested_rows, [unique.numel()], [unique.numel()]
        else:
            requested, send_counts, recv_counts = self._ask_owners(unique)
            requested_rows, local_row_of_slot = requested - self.first_row_id, None
        plan = FlatPlan(
            slots=slots,
            sorted_lookups=sorted_lookups,
            count=unique.numel(),
            local_row_of_slot=local_row_of_slot,
            send_counts=send_counts,
            recv_counts=recv_counts,
            requested_rows=requested_rows,
        )
        if training:
            plan.gradients = self._plan_gradients(plan, unique)
        return plan

    def _ask_owners(self, unique: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Send ids to the owners. Returns the ids that this rank is asked for, and how many go to and come from each rank.

        The first message to each rank holds how many ids are for it, how many are for the rank with the most, and as many
        ids as the largest plan so far had. Every rank learns the largest number of ids between any two ranks from it, so that
        all know alike whether the ids did not fit and travel by themselves, and how many fit from then on.
        """
        edges = torch.searchsorted(unique, torch.tensor(self.bounds, device=unique.device))
        counts = edges.diff()  # [ranks]
        message = unique.new_empty(counts.numel(), 2 + self._capacity)
        message[:, 0], message[:, 1] = counts, counts.max()
        if (
            unique.numel()
        ):  # each rank's ids, and what follows them where there is room; the counts tell how many are for it
            places = edges[:-1].unsqueeze(1) + torch.arange(self._capacity, device=unique.device)
            message[:, 2:] = unique[places.clamp_(max=unique.numel() - 1)]
        received = self._all_to_all("counts and ids", message)
        send_counts, (recv_counts, most) = counts.tolist(), received[:, :2].T.tolist()
        if max(most) <= self._capacity:
            ids = received[:, 2:]
            requested = ids[torch.arange(self._capacity, device=ids.device) < received[:, :1]]
        else:
            self._capacity = max(most) + max(most) // 8
            requested = self._all_to_all("ids", unique, send_counts=send_counts, recv_counts=recv_counts)
        return requested, send_counts, recv_counts

    def _plan_gradients(self, plan: FlatPlan, unique: Tensor) -> GradientPlan:
        """The way back. Both ends compute it from what they know already, without communication. unique: row ids [U]."""
        kept, local_rows, sorted_arrivals = None, plan.requested_rows, None
        send_counts, recv_counts = plan.send_counts, plan.recv_counts
        if self.trained_rows is not None:
            trained = self.trained_rows(unique)
            arriving = self.trained_rows(plan.requested_rows + self.first_row_id)
            kept, local_rows = trained.nonzero().squeeze(1), plan.requested_rows[arriving]
            send_counts, recv_counts = _kept_counts(trained, send_counts), _kept_counts(arriving, recv_counts)
        if self.group is not None:
            local_rows, _, sorted_arrivals = self.kernels.unique(local_rows, self.num_rows)
        return GradientPlan(
            kept=kept,
            send_counts=send_counts,
            recv_counts=recv_counts,
            local_rows=local_rows,
            sorted_arrivals=sorted_arrivals,
        )

    def start_fetch(self, plan: FlatPlan, read: ReadRows) -> Fetching:
        """One all-to-all."""
        values = read(plan.requested_rows)  # [R, w]
        if self.group is None:
            return lambda: values
        # the way back: this rank sends to each rank what that one requests, and receives what it requested itself
        return self._start_all_to_all(
            "rows", values, send_counts=plan.recv_counts, recv_counts=plan.send_counts, pinned=self.pin_rows
        )

    def tell_changes(self, plan: FlatPlan, changing: RowFilter) -> None:
        """One all-to-all, of a byte per row."""
        self.mark_changes(plan, changing(plan.requested_rows))

    def mark_changes(self, plan: FlatPlan, changing: Tensor) -> Changes:
        """As `tell_changes`. changing: which of the R requested rows change, bool [R]."""
        requests = changing.nonzero().squeeze(1)
        if self.group is None:
            counts = [requests.numel()]
            plan.changes = Changes(requests=requests, slots=requests, send_counts=counts, recv_counts=counts)
            return plan.changes
        marks = self._all_to_all(
            "marks of changing rows",
            changing.to(torch.uint8),
            send_counts=plan.recv_counts,
            recv_counts=plan.send_counts,
        )
        plan.changes = Changes(
            requests=requests,
            slots=marks.nonzero().squeeze(1),
            send_counts=_kept_counts(changing, plan.recv_counts),
            recv_counts=_kept_counts(marks, plan.send_counts),
        )
        return plan.changes

    def fetch_changed(self, plan: FlatPlan, read: ReadRows) -> tuple[Tensor, Tensor]:
        """One all-to-all."""
        changes = plan.changes
        assert changes is not None, "nobody told of changes"
        return changes.slots, self.send_changed(changes, read(plan.requested_rows[changes.requests]))

    def send_changed(self, changes: Changes, values: Tensor) -> Tensor:
        """The values of the changed rows [c, w] of this rank, for those that it sends of requested rows."""
        if self.group is None:
            return values
        return self._all_to_all(
            "changed rows",
            values,
            send_counts=changes.send_counts,
            recv_counts=changes.recv_counts,
            pinned=self.pin_rows,
        )

    def send_gradients(self, plan: FlatPlan, lookup_gradients: RowGradientSums) -> tuple[Tensor, RowGradientSums]:
        """One all-to-all."""
        gradients = plan.gradients
        assert gradients is not None, "a plan without gradients"
        if gradients.kept is not None:
            lookup_gradients = RowGradientSums(*(part[gradients.kept] for part in lookup_gradients))
        return self.send_kept_gradients(gradients, lookup_gradients)

    def send_kept_gradients(
        self, plan: GradientPlan, lookup_gradients: RowGradientSums
    ) -> tuple[Tensor, RowGradientSums]:
        """As `send_gradients`, from the gradients of the rows that are sent alone."""
        if plan.sorted_arrivals is None:
            return plan.local_rows, lookup_gradients
        received = self._all_to_all(
            "gradients",
            lookup_gradients.total.to(self.gradient_dtype),
            send_counts=plan.send_counts,
            recv_counts=plan.recv_counts,
        )
        sums = RowGradientSums.empty(plan.local_rows.numel(), received.shape[1], received.device)
        self.kernels.add(sums, plan.sorted_arrivals, received, fresh=True)  # each row's gradients are in rank order
        return plan.local_rows, sums

    def payload_bytes(self, plan: FlatPlan, row_bytes: int, grad_bytes: int) -> int:
        assert plan.gradients is not None, "a plan without gradients"
        # what goes to each rank: ids and gradients to owners, rows to requesters
        ids, rows, gradients = (
            sum(counts) - counts[self.rank]
            for counts in (plan.send_counts, plan.recv_counts, plan.gradients.send_counts)
        )
        return 8 * (len(plan.send_counts) - 1) + ids * 8 + rows * row_bytes + gradients * grad_bytes

    def _all_to_all(self, what: str, values: Tensor, **counts: Any) -> Tensor:
        return self._start_all_to_all(what, values, **counts)()

    def _start_all_to_all(
        self,
        what: str,
        values: Tensor,
        *,
        send_counts: list[int] | None = None,
        recv_counts: list[int] | None = None,
        pinned: bool = False,
    ) -> Fetching:
        """How many of the values go to each rank, and come from each; None for both: as many go to each as come from it."""
        shape = values.shape if recv_counts is None else (sum(recv_counts), *values.shape[1:])
        result = torch.empty(shape, dtype=values.dtype, device=values.device, pin_memory=pinned)
        sent = values.contiguous()
        assert self.group is not None
        with profiler_span(f"all-to-all of {what}", self.group):
            work = dist.all_to_all_single(result, sent, recv_counts, send_counts, group=self.group, async_op=True)
        return partial(_arrived, work, sent, result, f"{self.group.group_desc}: all-to-all of {what}")


def _arrived(work: dist.Work, sent: Tensor, result: Tensor, name: str) -> Tensor:
    """The result of a collective. sent: is kept in memory until then."""
    wait_for(work, name)
    return result


def _kept_counts(kept: Tensor, counts: list[int]) -> list[int]:
    """How many of each rank's rows are kept: kept [R], 0 or 1, has counts[i] values of rank i, in the order of the ranks."""
    return torch.stack([part.sum() for part in kept.split(counts)]).tolist()


def is_in(values: Tensor, ascending: Tensor) -> Tensor:
    """Which of values [n] are among `ascending` [r], bool [n]."""
    if ascending.numel() == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    index = torch.searchsorted(ascending, values).clamp(max=ascending.numel() - 1)
    return ascending[index] == values
