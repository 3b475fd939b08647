"""Rows of coming steps, fetched on a thread while the model computes; what a step updates is renewed before it is used.

So the numbers are those without it, bit for bit. The thread has an exchange of its own, with process groups of its own,
because collectives of one group must come in the same order on all ranks.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from overtok_megatron.kernels.rows import TableRows
from overtok_megatron.ngram.exchange import Exchange, Plan


class Prefetch:
    """exchange: the thread's own; read: local rows [r] int64 -> their values [r, w]. All calls are collectives of it."""

    def __init__(self, exchange: Exchange, read: Callable[[Tensor], Tensor]) -> None:
        self._exchange = exchange
        self._read = read
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._coming: deque[Future[tuple[Plan, TableRows]]] = deque()

    @property
    def pending(self) -> bool:
        return bool(self._coming)

    def start(self, ids: Tensor) -> None:
        """Begin to fetch the rows of one more step."""
        self._coming.append(self._thread.submit(self._fetch, ids))

    def _fetch(self, ids: Tensor) -> tuple[Plan, TableRows]:
        plan = self._exchange.plan(ids)
        return plan, TableRows(self._exchange.fetch(plan, self._read))

    def take(self) -> tuple[Plan, TableRows]:
        """The plan and the rows of the first step that was announced and not yet taken."""
        return self._coming.popleft().result()

    def wait(self) -> None:
        """Until nothing is being fetched: rows may change now."""
        for future in self._coming:
            future.result()

    def refresh(self, touched: Tensor) -> None:
        """Renew what was fetched of the rows touched [r] int64, local and ascending, which have just changed."""
        for future in self._coming:
            plan, rows = future.result()
            self._exchange.refresh(plan, rows.weight, touched, self._read)
