"""Unique ids out, rows back, gradients out: the one exchange of a step (contract C3). Knows no model and no optimizer.

Shapes: N ids asked for, U of them distinct, R rows asked of this rank by all ranks, r of them distinct, w row width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.kernels.rows import Distinct, RowKernels, Sums
from overtok_megatron.parallel.collectives import named

Read = Callable[[Tensor], Tensor]  # rows [r] int64, local to the shard -> their values [r, w]
Trained = Callable[[Tensor], Tensor]  # places [r] int64 in the row space -> whether their rows take updates, bool [r]


@dataclass
class Plan:
    """Who asks whom for what in one step: slots int64 [*ids.shape], each id's place among the `count` distinct ones.

    order [N] int64: the look-ups of each slot brought together (kernels.rows.Distinct).
    """

    slots: Tensor
    order: Tensor
    count: int


class Exchange(Protocol):
    """Moves rows and gradients between their owners and the ranks that use them.

    Every method is a collective of its groups: all ranks call it, also those with nothing to ask. gradient_dtype: what
    gradients travel in; they are summed in float32.
    """

    gradient_dtype: torch.dtype

    def plan(self, ids: Tensor) -> Plan:
        """ids: int64 of any shape, places in the row space."""

    def fetch(self, plan: Plan, read: Read) -> Tensor:
        """The plan's distinct rows [U, w] in ascending order, of the dtype in which the owners' `read` gives them."""

    def refresh(self, plan: Plan, rows: Tensor, touched: Tensor, read: Read) -> None:
        """Bring rows [U, w] that `fetch` gave up to date, in place; touched [r] int64: local rows that changed, ascending."""

    def return_gradients(self, plan: Plan, own: Sums) -> tuple[Tensor, Sums]:
        """Gradients of the U distinct rows to the owners, where what several ranks send for a row is summed.

        Those of rows that take no updates stay here. Returns the touched local rows [r] int64, distinct and ascending, and
        their sums. They run in rank order, so that they are the same at every run.
        """

    def payload_bytes(self, plan: Plan, row_bytes: int, grad_bytes: int) -> int:
        """Bytes that this rank sends to other ranks for a step: counts, ids, the rows that it serves, gradients."""


@dataclass
class FlatPlan(Plan):
    """sent[i]: rows asked of rank i; received[i]: rows that rank i asks here; asked [R] int64: those, local."""

    unique: Tensor  # [U] int64 ascending
    sent: list[int]
    received: list[int]
    asked: Tensor
    distinct: Distinct | None = None  # kept by distinct_asked
    trained: "tuple[FlatPlan, Tensor] | None" = None  # kept by trained_part


class FlatExchange:
    """Every rank talks to every other.

    bounds: first place of each rank and the end, ascending. group: whose ranks they are; None = one rank. gradient_dtype:
    what gradients travel in. trained: which rows take updates; None = all.
    """

    def __init__(
        self,
        bounds: Sequence[int],
        group: dist.ProcessGroup | None,
        kernels: RowKernels | None = None,
        gradient_dtype: torch.dtype = torch.float32,
        trained: Trained | None = None,
    ) -> None:
        self.bounds = tuple(bounds)
        self.trained = trained
        self.kernels = kernels or RowKernels()
        self.group = group
        self.gradient_dtype = gradient_dtype
        self.rank = 0 if group is None else dist.get_rank(group)
        assert len(self.bounds) == 1 + (1 if group is None else dist.get_world_size(group))

    def plan(self, ids: Tensor) -> FlatPlan:
        """Two all-to-alls: counts, then ids."""
        unique, slots, order = self.kernels.unique(ids, self.bounds[-1])
        count, first = unique.numel(), self.bounds[self.rank]
        if self.group is None:
            return FlatPlan(slots, order, count, unique, [count], [count], unique - first if first else unique)
        edges = torch.searchsorted(unique, torch.tensor(self.bounds, device=unique.device))
        counts = edges.diff()  # [ranks]
        received = self._all_to_all("counts", counts, None, None)
        sent, receives = counts.tolist(), received.tolist()
        asked = self._all_to_all("ids", unique, receives, sent)
        return FlatPlan(slots, order, count, unique, sent, receives, asked - first)

    def fetch(self, plan: Plan, read: Read) -> Tensor:
        """One all-to-all."""
        assert isinstance(plan, FlatPlan)
        answer = read(plan.asked)  # [R, w]
        return answer if self.group is None else self._all_to_all("rows", answer, plan.sent, plan.received)

    def refresh(self, plan: Plan, rows: Tensor, touched: Tensor, read: Read) -> None:
        """Three small all-to-alls: how many of each rank's rows changed, which, and their values."""
        assert isinstance(plan, FlatPlan)
        self._refresh(plan, rows, _is_in(plan.asked, touched), lambda places: read(plan.asked[places]))

    def _refresh(self, plan: FlatPlan, rows: Tensor, stale: Tensor, answer: Read) -> Tensor:
        """stale [R] bool over `asked`; answer: places in `asked` -> values. Returns the places of rows that were renewed."""
        places = stale.nonzero().squeeze(1)
        values = answer(places)
        if self.group is None:
            rows.index_copy_(0, places, values)
            return places
        starts = torch.tensor([0, *plan.received], device=places.device).cumsum(0)
        counts = torch.searchsorted(places, starts).diff()  # [ranks], of those asked by each
        theirs = self._all_to_all("changed counts", counts, None, None)
        sent, received = counts.tolist(), theirs.tolist()
        within = places - torch.repeat_interleave(starts[:-1], counts)
        told = self._all_to_all("changed places", within, received, sent)
        own_starts = torch.tensor([0, *plan.sent[:-1]], device=told.device).cumsum(0)
        told = told + torch.repeat_interleave(own_starts, theirs)  # place in `unique`
        rows.index_copy_(0, told, self._all_to_all("changed rows", values, received, sent))
        return told

    def return_gradients(self, plan: Plan, own: Sums) -> tuple[Tensor, Sums]:
        """One all-to-all."""
        assert isinstance(plan, FlatPlan)
        plan, kept = self.trained_part(plan)
        return self.send_gradients(plan, own if kept is None else Sums(own.total[kept], own.squares[kept]))

    def trained_part(self, plan: FlatPlan) -> tuple[FlatPlan, Tensor | None]:
        """The plan of the rows whose gradients travel, and which of the U those are, bool [U]; None = all.

        Asking and asked rank each find it by arithmetic on what they know already.
        """
        if self.trained is None:
            return plan, None
        if plan.trained is None:
            kept, wanted = self.trained(plan.unique), self.trained(plan.asked + self.bounds[self.rank])
            unique, asked = plan.unique[kept], plan.asked[wanted]
            sent, received = _kept_counts(kept, plan.sent), _kept_counts(wanted, plan.received)
            part = FlatPlan(plan.slots, plan.order, unique.numel(), unique, sent, received, asked)
            plan.trained = part, kept
        return plan.trained

    def send_gradients(self, plan: FlatPlan, own: Sums) -> tuple[Tensor, Sums]:
        """return_gradients for a plan all of whose rows take updates."""
        if self.group is None:
            return plan.asked, own
        inbox = self._all_to_all("gradients", own.total.to(self.gradient_dtype), plan.received, plan.sent)
        asked = self.distinct_asked(plan)
        sums = Sums.empty(asked.ids.numel(), inbox.shape[1], inbox.device)
        self.kernels.add(sums, asked.order, inbox, fresh=True)  # look-ups come in rank order
        return asked.ids, sums

    def distinct_asked(self, plan: FlatPlan) -> Distinct:
        """What is distinct, and local, among the R rows asked here."""
        if plan.distinct is None:
            plan.distinct = self.kernels.unique(plan.asked, self.bounds[self.rank + 1] - self.bounds[self.rank])
        return plan.distinct

    def payload_bytes(self, plan: Plan, row_bytes: int, grad_bytes: int) -> int:
        assert isinstance(plan, FlatPlan)
        asks = sum(plan.sent) - plan.sent[self.rank]
        serves = sum(plan.received) - plan.received[self.rank]
        trained, _ = self.trained_part(plan)
        returns = sum(trained.sent) - trained.sent[self.rank]
        return 8 * (len(plan.sent) - 1) + asks * 8 + serves * row_bytes + returns * grad_bytes

    def _all_to_all(self, what: str, sent: Tensor, out: list[int] | None, into: list[int] | None) -> Tensor:
        result = torch.empty_like(sent) if out is None else sent.new_empty(sum(out), *sent.shape[1:])
        assert self.group is not None
        with named(f"all-to-all of {what}", self.group):
            dist.all_to_all_single(result, sent.contiguous(), out, into, group=self.group)
        return result


def _kept_counts(kept: Tensor, counts: list[int]) -> list[int]:
    """How many of each rank's rows, counts[i] one after the other in kept [R] bool, are kept."""
    return torch.stack([part.sum() for part in kept.split(counts)]).tolist()


def _is_in(values: Tensor, ascending: Tensor) -> Tensor:
    """Which of values [n] are among `ascending` [r], bool [n]."""
    if ascending.numel() == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    place = torch.searchsorted(ascending, values).clamp(max=ascending.numel() - 1)
    return ascending[place] == values


@dataclass
class TwoLevelPlan(Plan):
    """within: between the ranks of this host; across: between hosts; middle [R within] place of each asked row among the
    distinct ones, which are what travels across; held: their values, once fetched."""

    within: FlatPlan
    across: FlatPlan
    middle: Tensor
    held: Tensor


class TwoLevelExchange:
    """Rows that several ranks of a host want cross the network once: first an exchange within the host, then across.

    Rank l of every host speaks for the ranks l of all hosts: it gathers what its host wants of them and asks. bounds:
    first place of each owner and the end, owners ordered by (l, host). within: this host's ranks; across: the ranks l of
    all hosts. Sums of gradients run over the host's ranks first, then over hosts: equal to the flat order to rounding.
    """

    def __init__(
        self,
        bounds: Sequence[int],
        within: dist.ProcessGroup | None,
        across: dist.ProcessGroup | None,
        kernels: RowKernels | None = None,
        gradient_dtype: torch.dtype = torch.float32,
        trained: Trained | None = None,
    ) -> None:
        hosts = 1 if across is None else dist.get_world_size(across)
        self.gradient_dtype = gradient_dtype
        self.within = FlatExchange(bounds[::hosts], within, kernels, gradient_dtype, trained)
        first = self.within.rank * hosts
        self.across = FlatExchange(bounds[first : first + hosts + 1], across, kernels, gradient_dtype, trained)

    def plan(self, ids: Tensor) -> TwoLevelPlan:
        within = self.within.plan(ids)
        wanted, middle, _ = self.within.distinct_asked(within)
        across = self.across.plan(wanted + self.within.bounds[self.within.rank])
        return TwoLevelPlan(within.slots, within.order, within.count, within, across, middle, ids.new_empty(0))

    def fetch(self, plan: Plan, read: Read) -> Tensor:
        assert isinstance(plan, TwoLevelPlan)
        plan.held = self.across.fetch(plan.across, read)
        return self.within.fetch(plan.within, lambda _: plan.held[plan.middle])

    def refresh(self, plan: Plan, rows: Tensor, touched: Tensor, read: Read) -> None:
        assert isinstance(plan, TwoLevelPlan)
        across = plan.across
        renewed = self.across._refresh(
            across, plan.held, _is_in(across.asked, touched), lambda places: read(across.asked[places])
        )
        stale = torch.zeros(plan.held.shape[0], dtype=torch.bool, device=rows.device).index_fill_(0, renewed, True)
        self.within._refresh(plan.within, rows, stale[plan.middle], lambda places: plan.held[plan.middle[places]])

    def return_gradients(self, plan: Plan, own: Sums) -> tuple[Tensor, Sums]:
        assert isinstance(plan, TwoLevelPlan)
        _, hosts = self.within.return_gradients(plan.within, own)
        across, _ = self.across.trained_part(plan.across)  # what came of the exchange within is only that part
        return self.across.send_gradients(across, hosts)

    def payload_bytes(self, plan: Plan, row_bytes: int, grad_bytes: int) -> int:
        assert isinstance(plan, TwoLevelPlan)
        return self.within.payload_bytes(plan.within, row_bytes, grad_bytes) + self.network_bytes(
            plan, row_bytes, grad_bytes
        )

    def network_bytes(self, plan: Plan, row_bytes: int, grad_bytes: int) -> int:
        """The part of payload_bytes that crosses hosts."""
        assert isinstance(plan, TwoLevelPlan)
        return self.across.payload_bytes(plan.across, row_bytes, grad_bytes)
