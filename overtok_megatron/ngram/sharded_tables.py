"""This rank's share of the n-gram tables of one family: its rows, their optimizer, and the exchange with all other ranks.

Shapes: A micro-batches, b batch, s sequence, T tables, w row width, U distinct rows of a step, r rows of this rank that
a step updates.
"""

from dataclasses import dataclass
from typing import Generic

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.kernels.rows import RowGradientSums, RowKernels, StoredRows
from overtok_megatron.ngram.exchange import Exchange, PlanT
from overtok_megatron.ngram.families import TableFamily
from overtok_megatron.ngram.fetched_rows import DistinctRows, FetchedRows
from overtok_megatron.ngram.prefetch import Prefetch
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.row_store import RowReader, RowStore
from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.parallel.collectives import all_reduce_in_place


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
        self.sequence_slice_index, self.num_sequence_slices = sequence_slice

    def row_ids(self, tokens: Tensor | None, history: Tensor | None = None) -> Tensor:
        """Row ids int64 [.., s / slices, T] of tokens [.., s] on the model's device; an empty tensor [0] for tokens None."""
        if tokens is None:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        ids = self.family.row_ids(tokens, history)
        return ids.chunk(self.num_sequence_slices, dim=-2)[self.sequence_slice_index]

    def fetch_rows(self, tokens: Tensor | None, *, history: Tensor | None = None) -> FetchedRows[PlanT]:
        """Fetch the rows of the n-grams of tokens int64 [.., s]: slots [.., s / slices, T], without gradients.

        history [.., n - 1]: the tokens before, in decoding. tokens None: this rank looks nothing up and only serves its rows.
        """
        return self.fetch_row_ids(self.row_ids(tokens, history))

    def fetch_row_ids(self, ids: Tensor, *, training: bool = False) -> FetchedRows[PlanT]:
        """Fetch rows by their ids, int64 of any shape, which is the shape of the slots. training: with a gradient buffer."""
        plan = self.exchange.plan(ids.to(self.store.device))
        stored = self.store.rows
        if plan.local_row_of_slot is not None and stored is not None and self.store.device == self.device:
            # every row is here: read in place
            return self._fetched(plan, stored, plan.local_row_of_slot, training=training)
        return self._fetched(plan, StoredRows(self.exchange.fetch(plan, self._read)), training=training)

    def _read(self, local_rows: Tensor) -> Tensor:
        return self.store.read(local_rows, self.dtype)

    def _fetched(
        self, plan: PlanT, stored: StoredRows, index: Tensor | None = None, *, training: bool
    ) -> FetchedRows[PlanT]:
        """stored: the store's rows with the index of each slot among them, or without an index the plan's rows alone."""
        if index is None:
            stored = StoredRows(_moved(stored.weight, self.device))
        rows = DistinctRows(
            stored=stored,
            index=index,
            plan=plan,
            sorted_lookups=_moved(plan.sorted_lookups, self.device) if training else None,
            dtype=self.dtype,
            kernels=self.kernels,
        )
        return FetchedRows(_moved(plan.slots, self.device), rows)


class ShardedTables(TableReader[PlanT]):
    """Tables that are trained: this rank's rows with their optimizer.

    A training step calls, on every rank and in this order: `fetch_rows(tokens, training=True)`, the forward and backward
    passes, `reduce_gradients`, `update_rows`. prefetch: where given, `announce(tokens)` may name the batches of coming
    steps; losses are the same without it.
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

    def announce(self, tokens: Tensor | None) -> None:
        """Begin to fetch the rows of a coming training step, from its tokens in host memory.

        To be called in the order of the steps.
        """
        if self.prefetch is not None:
            ids = self.row_ids(None if tokens is None else _moved(tokens, self.device))
            self.prefetch.start(ids.to(self.store.device))

    def fetch_rows(
        self, tokens: Tensor | None, *, history: Tensor | None = None, training: bool = False
    ) -> FetchedRows[PlanT]:
        """As `TableReader.fetch_rows`. training: all micro-batches of a step [A, b, s], with a gradient buffer."""
        if training and self.prefetch is not None and self.prefetch.pending:
            return self._fetched(*self.prefetch.take(), training=True)
        return self.fetch_row_ids(self.row_ids(tokens, history), training=training)

    def reduce_gradients(self, fetched: FetchedRows[PlanT], scale: float) -> RowGradients:
        """After the last backward pass: send the gradients of the fetched rows to their owners, and sum their squares.

        scale: what the gradients are to be multiplied by, the same on all ranks.
        """
        lookup_gradients = RowGradientSums(
            *(_moved(part, self.store.device) for part in fetched.rows.gradients(self.device))
        )
        local_rows, sums = self.exchange.send_gradients(fetched.rows.plan, lookup_gradients)
        squared_norm = (self.store.kernels.sum(sums.row_squared_norms) * scale**2).to(self.device)
        all_reduce_in_place(squared_norm, self.group, of="squares")
        return RowGradients(local_rows, sums.total, scale, squared_norm)

    def update_rows(self, gradients: RowGradients, learning_rate: float, clip_factor: float) -> None:
        """Update the rows of the step with their gradients times `clip_factor` (1.0 = not clipped)."""
        step_rows = gradients.local_rows
        if self.prefetch is not None:
            self.prefetch.wait()  # it may still read rows that are about to change
        snapshot = self.snapshot  # read once: the thread of a save removes it when the save is written
        if snapshot is not None:
            snapshot.preserve(step_rows)
        self.optimizer.update(step_rows, gradients.grad, learning_rate, gradients.scale * clip_factor)
        if self.prefetch is not None:
            self.prefetch.refresh(step_rows)

    def columns(self) -> dict[str, Tensor]:
        """Everything that a row has, values and optimizer state, by name: tensors with one entry per local row."""
        return {**self.store.columns(), **self.optimizer.state}

    def num_ever_updated(self) -> int:
        """How many of this rank's rows were ever updated."""
        return self.store.num_ever_updated()

    def payload_bytes(self, fetched: FetchedRows[PlanT]) -> int:
        """Bytes that this rank sends to other ranks for a step: rows travel in the model's dtype."""
        width = self.family.width
        return self.exchange.payload_bytes(
            fetched.rows.plan, width * self.dtype.itemsize, width * self.exchange.gradient_dtype.itemsize
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device: itself where it is there already, else a copy, to a GPU without waiting for it."""
    if tensor.device == device:
        return tensor
    if device.type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
