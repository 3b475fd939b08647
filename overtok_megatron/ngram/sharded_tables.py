"""This rank's share of the n-gram tables of one family: its rows, their optimizer, and the exchange with all other ranks.

Shapes: A micro-batches, b batch, s sequence, T tables, w row width, U distinct rows of a step, r rows of this rank that
a step updates.
"""

from dataclasses import dataclass
from functools import partial
from typing import Generic

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.kernels.rows import RowGradientSums, RowKernels, StoredRows
from overtok_megatron.ngram.exchange import Exchange, Fetching, PlanT
from overtok_megatron.ngram.families import TableFamily
from overtok_megatron.ngram.fetched_rows import DistinctRows, FetchedRows
from overtok_megatron.ngram.prefetch import PlannedStep, Prefetch
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.row_store import RowReader, RowStore
from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.parallel.collectives import all_reduce_in_place
from overtok_megatron.parallel.devices import CPU
from overtok_megatron.parallel.uploading import moved, to_host


@dataclass(frozen=True)
class RowGradients:
    """The gradients of a step for the rows that this rank owns: grad [r, w] float32, to be multiplied by `scale`.

    local_rows int64 [r]: the rows, distinct and ascending. global_squared_norm: float64 scalar, the sum of squares of the
    scaled gradients over the rows of all ranks, which is the tables' part of the global norm (contract C5).
    """

    local_rows: Tensor
    grad: Tensor
    scale: float
    global_squared_norm: Tensor


def slice_row_ids(
    family: TableFamily,
    sequence_slice: tuple[int, int],
    device: torch.device,
    tokens: Tensor | None,
    history: Tensor | None = None,
    *,
    overlap: int = 0,
) -> Tensor:
    """Row ids int64 [.., s / slices + overlap, T] of one slice of tokens on a device; an empty tensor [0] for tokens None.

    tokens [.., s + overlap]: s positions that are cut into slices, and so many further tokens. overlap: how many positions
    after its slice are looked up as well: of the next slice, or after the last slice the further tokens. sequence_slice:
    (index, count of slices). history: as in `TableFamily.row_ids`.
    """
    if tokens is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    index, count = sequence_slice
    row_ids = family.row_ids(tokens, history)
    length, rest = divmod(row_ids.shape[-2] - overlap, count)
    assert rest == 0, f"{row_ids.shape[-2]} tokens, {overlap} of them further ones, do not divide into {count} slices"
    return row_ids.narrow(-2, index * length, length + overlap)


class TableReader(Generic[PlanT]):
    """Tables that are only read, as in evaluation and generation.

    family: how row ids are made, and the width of rows. device: where the model computes, with its kernels; the rows may lie
    elsewhere, and have kernels of their own. group: all ranks, which all must call `fetch_rows`; None = every row is here.
    sequence_slice: (index, count): into how many slices every sequence is cut, and which of them this rank looks up.
    """

    def __init__(
        self,
        family: TableFamily,
        store: RowReader,
        exchange: Exchange[PlanT],
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: RowKernels,
        group: dist.ProcessGroup | None = None,
        sequence_slice: tuple[int, int] = (0, 1),
    ) -> None:
        self.family = family
        self.store = store
        self.exchange = exchange
        self.dtype = dtype
        self.device = device
        self.kernels = kernels
        self.group = group
        self.sequence_slice = sequence_slice

    def row_ids(self, tokens: Tensor | None, history: Tensor | None = None, *, overlap: int = 0) -> Tensor:
        """`slice_row_ids` of this rank's slice, on the model's device."""
        return slice_row_ids(self.family, self.sequence_slice, self.device, tokens, history, overlap=overlap)

    def fetch_rows(self, tokens: Tensor | None, *, history: Tensor | None = None) -> FetchedRows[PlanT]:
        """Fetch the rows of the n-grams of tokens int64 [.., s]: slots [.., s / slices, T], without gradients.

        history [.., n - 1]: the tokens before, in decoding. tokens None: this rank looks nothing up and only serves its rows.
        """
        return self.fetch_row_ids(self.row_ids(tokens, history))

    def fetch_row_ids(self, ids: Tensor, *, training: bool = False) -> FetchedRows[PlanT]:
        """Fetch rows by their ids, int64 of any shape, which is the shape of the slots. training: with a gradient buffer."""
        plan = self.exchange.plan(ids.to(self.store.device), training=training)
        return self._fetch(plan, plan.slots, plan.sorted_lookups, training=training)

    def _fetch(
        self, plan: PlanT, slots: Tensor, sorted_lookups: Tensor, *, training: bool, rows: Tensor | None = None
    ) -> FetchedRows[PlanT]:
        """The rows of a plan on the rows' device, with its slots and look-ups on any. rows: its distinct rows, if known."""
        stored, index = self.store.rows, plan.local_row_of_slot
        if rows is not None or index is None or stored is None or self.store.device != self.device:
            if rows is None:
                rows = self.exchange.start_fetch(plan, self._read)()
            stored, index = StoredRows(moved(rows, self.device)), None
        # else every row is here: read in place
        distinct = DistinctRows(
            stored=stored,
            index=index,
            plan=plan,
            sorted_lookups=moved(sorted_lookups, self.device) if training else None,
            dtype=self.dtype,
            kernels=self.kernels,
        )
        return FetchedRows(moved(slots, self.device), distinct)

    def _read(self, local_rows: Tensor) -> Tensor:
        return self.store.read(local_rows, self.dtype)


class ShardedTables(TableReader[PlanT]):
    """Tables that are trained: this rank's rows with their optimizer.

    A training step calls, on every rank and in this order: `fetch_rows(tokens, training=True)`, the forward and backward
    passes, `reduce_gradients`, `update_rows`, `start_next_fetch`. prefetch: where given, it plans every step, and fetches and
    updates rows on the host; `announce(tokens)` may name the batches of coming steps, so that it does so ahead; losses are the
    same without.
    """

    store: RowStore

    def __init__(
        self,
        family: TableFamily,
        store: RowStore,
        exchange: Exchange[PlanT],
        *,
        optimizer: RowOptimizer,
        dtype: torch.dtype,
        device: torch.device,
        kernels: RowKernels,
        group: dist.ProcessGroup | None = None,
        sequence_slice: tuple[int, int] = (0, 1),
        prefetch: Prefetch[PlanT] | None = None,
    ) -> None:
        super().__init__(
            family, store, exchange,
            dtype=dtype, device=device, kernels=kernels, group=group, sequence_slice=sequence_slice,
        )  # fmt: skip
        self.optimizer = optimizer
        self.prefetch = prefetch
        self.snapshot: RowSnapshot | None = None  # being written by a save
        self._under_way: tuple[PlannedStep[PlanT], Fetching] | None = None  # the next step, with rows on the device

    def announce(self, tokens: Tensor | None, *, overlap: int = 0) -> None:
        """Begin to plan a coming training step, from its tokens in host memory; to be called in the order of the steps.

        overlap: as in `slice_row_ids`.
        """
        if self.prefetch is not None:
            self.prefetch.start(_on_host(tokens), overlap)

    def fetch_rows(
        self, tokens: Tensor | None, *, history: Tensor | None = None, training: bool = False, overlap: int = 0
    ) -> FetchedRows[PlanT]:
        """As `TableReader.fetch_rows`. training: all micro-batches of a step [A, b, s], with a gradient buffer.

        overlap: as in `slice_row_ids`, with tokens [.., s + overlap] and slots [.., s / slices + overlap, T]. A step that was
        announced takes what was planned for it.
        """
        if self.prefetch is None:
            return self.fetch_row_ids(self.row_ids(tokens, history, overlap=overlap), training=training)
        assert history is None, "tables in training look up whole sequences"
        if training:
            if self._under_way is not None:
                (step, arriving), self._under_way = self._under_way, None
                step.rows = arriving()
            else:
                if not self.prefetch.pending:
                    self.announce(tokens, overlap=overlap)
                step = self.prefetch.take()
        else:
            step = self.prefetch.once(_on_host(tokens), overlap)
        return self._fetch(step.plan, step.slots, step.sorted_lookups, training=training, rows=step.rows)

    def reduce_gradients(self, fetched: FetchedRows[PlanT], scale: float) -> RowGradients:
        """After the last backward pass: send the gradients of the fetched rows to their owners, and sum their squares.

        scale: what the gradients are to be multiplied by, the same on all ranks.
        """
        lookup_gradients = fetched.rows.gradients(self.device)
        if self.store.device != self.device:
            lookup_gradients = RowGradientSums(*to_host(*lookup_gradients))
        local_rows, sums = self.exchange.send_gradients(fetched.rows.plan, lookup_gradients)
        squared_norm = moved(self.store.kernels.sum(sums.row_squared_norms) * scale**2, self.device)
        all_reduce_in_place(squared_norm, self.group, of="squares")
        return RowGradients(local_rows, sums.total, scale, squared_norm)

    def update_rows(self, gradients: RowGradients, learning_rate: float, clip_factor: float) -> None:
        """Update the rows of the step with their gradients times `clip_factor` (1.0 = not clipped).

        Rows on the host are updated on the thread; `settle` waits for it.
        """
        if self.prefetch is not None and self.prefetch.updates_rows:
            self.prefetch.update(partial(self._update_rows, gradients, learning_rate, clip_factor))
        else:
            self._update_rows(gradients, learning_rate, clip_factor)

    def leave_out_update(self) -> None:
        """End a training step without an update: no row, no state and no count of steps changes. In place of `update_rows`."""
        if self.prefetch is not None and self.prefetch.updates_rows:
            self.prefetch.update(lambda: None)

    def start_next_fetch(self) -> None:
        """Begin to send the rows of the next step, if it was announced; to be called once the step's rows are updated.

        They travel while the main thread reports the step that has ended, and takes the tokens of the next one. Rows on the
        host are fetched by the thread. Where this is not called, the next step begins with the fetch.
        """
        if self.prefetch is None or self.prefetch.updates_rows:
            return
        assert self._under_way is None, "the rows of the next step had been read before"
        if self.prefetch.pending and self.group is not None:
            step = self.prefetch.take()
            self._under_way = step, self.exchange.start_fetch(step.plan, self._read)

    def _update_rows(self, gradients: RowGradients, learning_rate: float, clip_factor: float) -> None:
        snapshot = self.snapshot  # read once: the thread of a save removes it when the save is written
        if snapshot is not None:
            snapshot.preserve(gradients.local_rows)
        self.optimizer.update(gradients.local_rows, gradients.grad, learning_rate, gradients.scale * clip_factor)

    def settle(self) -> None:
        """Wait until all updates of rows have been made. Call this before rows, or the optimizer's state, are read directly.

        Rows may be written directly only while no step is announced: the rows of the next one may have been read already.
        """
        if self.prefetch is not None:
            self.prefetch.wait()

    @property
    def any_announced(self) -> bool:
        """Whether a step was announced that has not begun."""
        return self._under_way is not None or (self.prefetch is not None and self.prefetch.pending)

    def columns(self) -> dict[str, Tensor]:
        """Everything that a row has, values and optimizer state, by name: tensors with one entry per local row."""
        self.settle()
        return {**self.store.columns(), **self.optimizer.state}

    def num_ever_updated(self) -> int:
        """How many of this rank's rows were ever updated."""
        self.settle()
        return self.store.num_ever_updated()

    def payload_bytes(self, fetched: FetchedRows[PlanT]) -> int:
        """Bytes that this rank sends to other ranks for a step: rows travel in the model's dtype."""
        width = self.family.width
        return self.exchange.payload_bytes(
            fetched.rows.plan, width * self.dtype.itemsize, width * self.exchange.gradient_dtype.itemsize
        )


def _on_host(tokens: Tensor | None) -> Tensor | None:
    return None if tokens is None else moved(tokens, CPU)
