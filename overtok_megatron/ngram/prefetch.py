"""Coming steps, planned on a thread of the host while the model computes; where rows lie on the host, fetched as well.

A plan (exchange.py) is integers alone: row ids from tokens, the distinct ones among them, who asks whom for what, and the way
back of the gradients. With it, the main thread knows every size before a step begins: for tables on the model's device it
reads the rows and sends them in one all-to-all, as soon as the step before has updated its own, without a wait for the device.

Rows on the host are fetched a step ahead, before the step that runs has updated them. Its own plan says which rows those are:
they travel again after the update, which runs on the thread too. Losses are bit for bit those of rows that are fetched at the
start of their step.

All messages of the thread go over process groups of its own, in the order of its jobs, which is the same on all ranks.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol

import torch
from torch import Tensor

from overtok_megatron.ngram.exchange import Exchange, PlanT, ReadRows, is_in
from overtok_megatron.parallel.uploading import Upload, use
from overtok_megatron.parallel.worker import Worker


class RowIds(Protocol):
    """Tokens on the host, or None -> the row ids that this rank looks up; overlap: as in `sharded_tables.slice_row_ids`."""

    def __call__(self, tokens: Tensor | None, *, overlap: int) -> Tensor: ...


@dataclass(kw_only=True)
class PlannedStep(Generic[PlanT]):
    """What the thread made for one step or evaluation.

    plan: on the device where the rows lie. slots, sorted_lookups: the plan's, on the model's device. rows [U, w]: the fetched
    rows, on the model's device; None where the main thread fetches them. changes: whether some of them must be fetched again.
    uploaded: the end of the copies to that device.
    """

    plan: PlanT
    slots: Tensor
    sorted_lookups: Tensor
    rows: Tensor | None = None
    changes: bool = False
    uploaded: Any = None


class Prefetch(Generic[PlanT]):
    """A queue of the steps that are planned, and the thread that plans them. All ranks must call each method in the same order.

    row_ids: what this rank looks up. exchange: the thread's own. upload: to the model's device. read: local rows [r] int64
    -> their values [r, w] for rows on the host; None for rows on the device.
    """

    def __init__(
        self,
        row_ids: RowIds,
        exchange: Exchange[PlanT],
        upload: Upload,
        read: ReadRows | None,
    ) -> None:
        self._row_ids = row_ids
        self._exchange = exchange
        self._upload = upload
        self._read = read
        self._worker = Worker("tables", upload.device)
        self._steps: deque[Future[PlannedStep[PlanT]]] = deque()  # started and not taken
        self._completion: Future[None] | None = None  # of the first of them
        # For the thread alone: the rows that fetched steps will update, of steps that may not have ended.
        self._unsettled: deque[Tensor] = deque()

    @property
    def updates_rows(self) -> bool:
        """Whether the thread reads rows, and so has to update them."""
        return self._read is not None

    @property
    def pending(self) -> bool:
        """Whether a step was started and not yet taken."""
        return bool(self._steps)

    def start(self, tokens: Tensor | None, overlap: int = 0) -> None:
        """Begin to plan one more step. tokens int64, on the host; None: this rank looks nothing up. overlap: for `row_ids`."""
        self._steps.append(self._worker.submit(partial(self._prepare, tokens, overlap, training=True)))

    def take(self) -> PlannedStep[PlanT]:
        """The first step that was started and not yet taken, with rows as they are now."""
        self._complete_first()
        step = self._steps.popleft()
        completion, self._completion = self._completion, None
        if completion is not None:
            self._worker.result(completion)
        return self._used(self._worker.result(step))

    def once(self, tokens: Tensor | None, overlap: int = 0) -> PlannedStep[PlanT]:
        """The plan, without a way back, for tokens that are evaluated now; on the host the rows as they are now."""
        job = self._worker.submit(partial(self._prepare, tokens, overlap, training=False))
        return self._used(self._worker.result(job))

    def update(self, work: Callable[[], None]) -> None:
        """Update rows on the thread, after the step that was taken last. Whoever reads rows must `wait` before."""
        self._worker.submit(work)
        self._complete_first()

    def wait(self) -> None:
        """Return when the thread has done everything that was given to it. Raises what it raised."""
        self._worker.wait()

    def _complete_first(self) -> None:
        """Have the first step's rows brought up to date, once: no other step will change them before it is taken."""
        if self._steps and self._completion is None and self.updates_rows:
            self._completion = self._worker.submit(partial(self._complete, self._steps[0]))

    def _used(self, step: PlannedStep[PlanT]) -> PlannedStep[PlanT]:
        use(step.uploaded, step.plan, step.slots, step.sorted_lookups, step.rows)
        return step

    def _prepare(self, tokens: Tensor | None, overlap: int, *, training: bool) -> PlannedStep[PlanT]:
        """On the thread: plan, and for rows on the host fetch."""
        plan = self._exchange.plan(self._row_ids(tokens, overlap=overlap), training=training)
        if self._read is None:
            plan = self._upload.copy_integers(plan)
            return PlannedStep(
                plan=plan,
                slots=plan.slots,
                sorted_lookups=plan.sorted_lookups,
                uploaded=self._upload.end(),
            )
        rows = self._exchange.start_fetch(plan, self._read)()
        changes = training and bool(self._unsettled)  # the same on all ranks
        if changes:
            self._exchange.tell_changes(plan, self._will_change)
        if training:
            self._unsettled.append(plan.step_rows)
        return PlannedStep(
            plan=plan,
            slots=self._upload.copy(plan.slots),
            sorted_lookups=self._upload.copy(plan.sorted_lookups),
            rows=self._upload.copy(rows),
            changes=changes,
            uploaded=self._upload.end(),
        )

    def _will_change(self, local_rows: Tensor) -> Tensor:
        changing = torch.zeros_like(local_rows, dtype=torch.bool)
        for step_rows in self._unsettled:
            changing |= is_in(local_rows, step_rows)
        return changing

    def _complete(self, started: "Future[PlannedStep[PlanT]]") -> None:
        """On the thread, when the step before has ended: fetch those rows again that it may have updated."""
        step = started.result()
        while self._unsettled[0] is not step.plan.step_rows:  # of the steps before, which change nothing any more
            self._unsettled.popleft()
        assert self._read is not None and step.rows is not None
        if step.changes:
            slots, values = (self._upload.copy(part) for part in self._exchange.fetch_changed(step.plan, self._read))
            with self._upload.stream():
                step.rows.index_copy_(0, slots, values)
            step.uploaded = self._upload.end()
