"""This rank's share of the n-gram tables: its rows, their optimizer, and the exchange with all other ranks.

Shapes: A micro-batches, b batch, s sequence, T tables, w row width, U distinct rows of a step, r touched rows of this rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.kernels.rows import RowKernels, Sums, TableRows
from overtok_megatron.ngram.exchange import Exchange, FlatPlan, Plan
from overtok_megatron.ngram.fetched_rows import DistinctRows, FetchedRows
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.prefetch import Prefetch
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.row_store import RowReader, RowStore
from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.parallel.collectives import named


@dataclass(frozen=True)
class RowGradients:
    """The gradients of a step for the rows that this rank owns: grad [r, w] float32, to be taken times `scale`.

    index int64 [r]: the local rows, distinct and ascending. square: float64 scalar, the sum of squares over all ranks of
    the scaled gradients, which is the tables' part of the global norm (contract C5).
    """

    index: Tensor
    grad: Tensor
    scale: float
    square: Tensor


class TableReader:
    """Tables that are only read, as in evaluation and generation.

    device: where the model computes, with its kernels; the rows may lie elsewhere, and have their own. group: all ranks,
    which all call `fetch_rows`; None = every row is here. sequence_slice: (index, count) of the slice of every sequence
    that this rank looks up.
    """

    def __init__(
        self,
        ngram_hash: NgramHash,
        store: RowReader,
        exchange: Exchange,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: RowKernels,
        group: dist.ProcessGroup | None = None,
        sequence_slice: tuple[int, int] = (0, 1),
    ) -> None:
        self.ngram_hash = ngram_hash
        self.store = store
        self.exchange = exchange
        self.dtype = dtype
        self.device = device
        self.kernels = kernels
        self.group = group
        self.slice_index, self.num_slices = sequence_slice

    def row_ids(self, tokens: Tensor | None, history: Tensor | None = None) -> Tensor:
        """Row ids int64 [.., s / slices, T] of tokens [.., s] on the model's device; none, [0], for tokens None."""
        if tokens is None:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        ids = self.ngram_hash.rows(tokens, history)
        return ids.chunk(self.num_slices, dim=-2)[self.slice_index]

    def fetch_rows(self, tokens: Tensor | None, *, history: Tensor | None = None) -> FetchedRows:
        """Fetch the rows of the n-grams of tokens int64 [.., s]: slots [.., s / slices, T], without gradients.

        history [.., n - 1]: the tokens before, in decoding. tokens None: this rank looks nothing up, and serves its rows.
        """
        return self.fetch_row_ids(self.row_ids(tokens, history))

    def fetch_row_ids(self, ids: Tensor, *, training: bool = False) -> FetchedRows:
        """Fetch rows by their ids, int64 of any shape, which is that of the slots. training: with a gradient buffer."""
        plan = self.exchange.plan(ids.to(self.store.device))
        stored, index = self.store.rows, None
        if self.group is None and stored is not None and self.store.device == self.device:
            assert isinstance(plan, FlatPlan)
            index = plan.asked  # every row is here, in place
        else:
            stored = TableRows(self.exchange.fetch(plan, self._read))
        return self._fetched(plan, stored, index, training=training)

    def _read(self, index: Tensor) -> Tensor:
        return self.store.read(index, self.dtype)

    def _fetched(self, plan: Plan, stored: TableRows, index: Tensor | None = None, *, training: bool) -> FetchedRows:
        if index is None:
            stored = TableRows(_moved(stored.weight, self.device))
        sorted_lookups = _moved(plan.order, self.device) if training else None
        rows = DistinctRows(stored, index, plan, sorted_lookups, self.dtype, self.kernels)
        return FetchedRows(_moved(plan.slots, self.device), rows)


class ShardedTables(TableReader):
    """Tables that are trained: this rank's rows with their optimizer.

    Order of calls in a training step, all of which every rank makes: `fetch_rows(tokens, training=True)`, the forward and
    backward passes, `reduce_gradients`, `update_rows`. prefetch: where given, `announce(tokens)` may name the batches of
    coming steps; a step's numbers are the same without.
    """

    store: RowStore

    def __init__(
        self,
        ngram_hash: NgramHash,
        store: RowStore,
        exchange: Exchange,
        *,
        optimizer: RowOptimizer,
        dtype: torch.dtype,
        device: torch.device,
        kernels: RowKernels,
        group: dist.ProcessGroup | None = None,
        sequence_slice: tuple[int, int] = (0, 1),
        prefetch: Prefetch | None = None,
    ) -> None:
        super().__init__(
            ngram_hash, store, exchange,
            dtype=dtype, device=device, kernels=kernels, group=group, sequence_slice=sequence_slice,
        )  # fmt: skip
        self.optimizer = optimizer
        self.prefetch = prefetch
        self.snapshot: RowSnapshot | None = None  # being written by a save

    def announce(self, tokens: Tensor | None) -> None:
        """Name the tokens of a coming training step, in the order of the steps, so that its rows are fetched meanwhile."""
        if self.prefetch is not None:
            self.prefetch.start(self.row_ids(tokens).to(self.store.device))

    def fetch_rows(
        self, tokens: Tensor | None, *, history: Tensor | None = None, training: bool = False
    ) -> FetchedRows:
        """As `TableReader.fetch_rows`. training: all micro-batches of a step [A, b, s], with a gradient buffer."""
        if training and self.prefetch is not None and self.prefetch.pending:
            return self._fetched(*self.prefetch.take(), training=True)
        return self.fetch_row_ids(self.row_ids(tokens, history), training=training)

    def reduce_gradients(self, fetched: FetchedRows, scale: float) -> RowGradients:
        """After the last backward pass: send the gradients of the fetched rows to their owners, one all-to-all.

        scale: what the gradients are to be multiplied with, the same on all ranks.
        """
        own = Sums(*(_moved(part, self.store.device) for part in fetched.rows.gradients(self.device)))
        index, sums = self.exchange.return_gradients(fetched.rows.plan, own)
        square = (self.store.kernels.sum(sums.squares) * scale**2).to(self.device)
        if self.group is not None:
            with named("all-reduce of squares", self.group):
                dist.all_reduce(square, group=self.group)
        return RowGradients(index, sums.total, scale, square)

    def update_rows(self, gradients: RowGradients, learning_rate: float, clip_factor: float) -> None:
        """Update the touched rows with their gradients times `clip_factor` (1.0 = not clipped)."""
        if self.prefetch is not None:
            self.prefetch.wait()  # what it still reads is about to change
        snapshot = self.snapshot  # read once: the thread that writes it removes it when it is done
        if snapshot is not None:
            snapshot.preserve(gradients.index)
        self.optimizer.update(gradients.index, gradients.grad, learning_rate, gradients.scale * clip_factor)
        if self.prefetch is not None:
            self.prefetch.refresh(gradients.index)

    def columns(self) -> dict[str, Tensor]:
        """Everything that belongs to a row, by name: tensors with one row for each of the store's."""
        return {**self.store.columns(), **self.optimizer.state}

    def num_touched(self) -> int:
        """How many of this rank's rows were ever updated."""
        return self.store.num_touched()

    def payload_bytes(self, fetched: FetchedRows) -> int:
        """What this rank sends to other ranks for a step: rows travel in the model's dtype."""
        width = self.ngram_hash.space.width
        return self.exchange.payload_bytes(
            fetched.rows.plan, width * self.dtype.itemsize, width * self.exchange.gradient_dtype.itemsize
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On another device, by a copy that others may overlap; the tensor itself where it is there already."""
    if tensor.device == device:
        return tensor
    if device.type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
