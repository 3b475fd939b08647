"""Rows of coming steps, fetched on a thread while the model computes.

Rows that a step updates after they were fetched are renewed before they are used, so losses are bit for bit the same as without
prefetching. The thread has an exchange of its own, with process groups of its own, because all ranks must call the collectives
of one group in the same order.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic

from torch import Tensor

from overtok_megatron.kernels.rows import StoredRows
from overtok_megatron.ngram.exchange import Exchange, PlanT, ReadRows


class Prefetch(Generic[PlanT]):
    """A queue of the steps whose rows are being fetched or are there. All ranks must call each method in the same order.

    exchange: the thread's own. read: local rows [r] int64 -> their values [r, w].
    """

    def __init__(self, exchange: Exchange[PlanT], read: ReadRows) -> None:
        self._exchange = exchange
        self._read = read
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._steps: deque[Future[tuple[PlanT, StoredRows]]] = deque()

    @property
    def pending(self) -> bool:
        """Whether a step was started and not yet taken."""
        return bool(self._steps)

    def start(self, ids: Tensor) -> None:
        """Begin to fetch the rows of one more step. ids: row ids, int64 of any shape."""
        self._steps.append(self._thread.submit(self._fetch, ids))

    def _fetch(self, ids: Tensor) -> tuple[PlanT, StoredRows]:
        plan = self._exchange.plan(ids)
        return plan, StoredRows(self._exchange.fetch(plan, self._read))

    def take(self) -> tuple[PlanT, StoredRows]:
        """The plan and the rows of the first step that was started and not yet taken."""
        return self._steps.popleft().result()

    def wait(self) -> None:
        """Wait until nothing is being fetched; then rows may change."""
        for step in self._steps:
            step.result()

    def refresh(self, step_rows: Tensor) -> None:
        """Renew the fetched copies of step_rows [r] int64, ascending: this rank's local rows that were just updated."""
        for step in self._steps:
            plan, rows = step.result()
            self._exchange.refresh(plan, rows.weight, step_rows, self._read)
