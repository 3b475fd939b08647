"""The over-encoder: a small module that the model sees, and the sharded tables that feed it once a step.

`NgramProjection` holds only the projection; `ShardedTables` holds this rank's rows, their optimizer and the exchange. They meet in
`FetchedRows`, the distinct rows of a step with one gradient buffer: forward gathers from it and backward adds into it, with
no communication in either (contract C3).

Shapes: A micro-batches, b batch, s sequence (a slice of it under tensor parallelism), T tables, B of them base tables, w row
width, d hidden (B w where nothing else is asked for), U distinct rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.kernels.rows import RowKernels, Sums, TableRows
from overtok_megatron.ngram.exchange import Exchange, FlatPlan, Plan
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.prefetch import Prefetch
from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.ngram.row_store import Shard, TableShard
from overtok_megatron.parallel.collectives import copy_to_group, named
from overtok_megatron.parallel.splits import initialise

Combine = Literal["sum", "mean", "scaled"]


@dataclass
class FetchedRows:
    """The rows of one step: row `index[slot]` of `rows` for a slot below U, or row `slot` without an index.

    count: U. order: of all the step's look-ups (kernels.rows.Distinct); None where no gradients are wanted. dtype: of
    the model.
    """

    rows: TableRows
    index: Tensor | None
    count: int
    order: Tensor | None
    dtype: torch.dtype
    kernels: RowKernels

    def __post_init__(self) -> None:
        self.leaf = torch.empty(0, requires_grad=self.order is not None)  # what makes autograd call backward
        self._sums: Sums | None = None

    def order_of(self, slots: Tensor) -> Tensor | None:
        """The order of one micro-batch's slots; where it is the only one, that of the step."""
        if self.order is None or slots.numel() == self.order.numel():
            return self.order
        return self.kernels.order(slots, self.count)

    def add(self, order: Tensor, grad: Tensor) -> None:
        """Sum gradients [N, w] of the look-ups that `order` [N] brings together."""
        fresh = self._sums is None
        if self._sums is None:
            self._sums = Sums.empty(self.count, grad.shape[-1], grad.device)
        self.kernels.add(self._sums, order, grad, fresh=fresh)

    def sums(self, device: torch.device) -> Sums:
        """The gradients of all micro-batches; zeros where nothing was looked up."""
        if self._sums is None:
            count, width = self.count, self.rows.weight.shape[1]
            return Sums(torch.zeros(count, width, device=device), torch.zeros(count, device=device))
        return self._sums


class _GatherRows(torch.autograd.Function):
    """Forward: the rows of slots. Backward: adds into the step's gradient; the leaf itself receives no gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, step: FetchedRows, slots: Tensor) -> Tensor:
        ctx.step, ctx.order = step, step.order_of(slots)
        return step.kernels.gather(step.rows, step.index, slots, step.dtype, ctx.order)  # [b, s, T, w]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        assert ctx.order is not None, "backward through rows that were fetched without a gradient"
        ctx.step.add(ctx.order, grad.reshape(-1, grad.shape[-1]))
        return None, None, None


def gather_rows(step: FetchedRows, slots: Tensor) -> Tensor:
    """slots int64 of any shape into a step's rows -> [*slots, w] in the model's dtype; backward adds into the step."""
    gathered: Tensor = _GatherRows.apply(step.leaf, step, slots)
    return gathered


class NgramProjection(nn.Module):
    """Joins the gathered n-gram rows to the 1-gram embedding (paper section 3.2; METHOD of combination is a switch).

    The B projections W_s: w -> d of the base tables, summed, are one d x (B w) linear on the concatenation of the rows, and
    so are those of each group of tables that was added later. combine: "sum" e + o; "mean" (e + o) / (1 + B), the paper's
    pseudo-code; "scaled" e + o / (1 + B). B, not T: added tables leave the scale of what is there as it is. group: the
    tensor-parallel group, whose ranks each see their own slice of the sequence.
    """

    def __init__(
        self,
        hidden_size: int,
        num_tables: int,
        *,
        combine: Combine,
        row_width: int | None = None,
        added_tables: Sequence[int] = (),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """num_tables: B. row_width: w; None = hidden_size / B. added_tables: how many tables each added group has."""
        super().__init__()
        assert row_width is not None or hidden_size % num_tables == 0
        self.num_tables = num_tables
        self.added_tables = tuple(added_tables)
        self.combine = combine
        self.group = group
        self.row_width = row_width or hidden_size // num_tables
        self.projection = nn.Parameter(torch.empty(hidden_size, num_tables * self.row_width))
        # Weights of their own: products over more columns may sum in another order, and what is there must keep its bits.
        # No ParameterList: ZeRO 3 gathers a module's own parameters
        for number, tables in enumerate(self.added_tables):
            weight = nn.Parameter(torch.empty(hidden_size, tables * self.row_width))
            self.register_parameter(f"added_projection_{number}", weight)
        self.step: FetchedRows | None = None

    def reset(self, seed: int, name: str) -> None:
        """Deviation (B w)^-1/2: the n-gram part begins at the scale of its rows; that of added tables likewise."""
        for key, weight in self.named_parameters():
            initialise(weight, weight.shape[1] ** -0.5, seed, f"{name}.{key}")

    def forward(self, slots: Tensor) -> Tensor:
        """The n-gram part before combination: slots [b, s, T] int64 into the step's rows -> [b, s, d]."""
        assert self.step is not None, "no rows were fetched for this step"
        gathered = gather_rows(self.step, slots)  # [b, s, T, w]
        total: Tensor | None = None
        for part, weight in zip(
            gathered.split([self.num_tables, *self.added_tables], dim=-2), self.parameters(), strict=True
        ):
            whole = copy_to_group(weight, self.group)  # each rank saw a slice: the gradient is summed
            # Contiguous: the very product of a model without the other groups, so that their rows of zero change no bit
            own = F.linear(part.flatten(-2).contiguous(), whole)
            total = own if total is None else total + own
        assert total is not None
        return total

    def join(self, base: Tensor, ngrams: Tensor) -> Tensor:
        """base, ngrams [b, s, d] -> [b, s, d] by the combination rule."""
        share = 1.0 / (1 + self.num_tables)
        if self.combine == "sum":
            return base + ngrams
        if self.combine == "mean":
            return (base + ngrams) * share
        return torch.add(base, ngrams, alpha=share)

    @torch.no_grad()
    def order_norms(self, slots: Tensor, orders: tuple[int, ...]) -> dict[int, float]:
        """Mean L2 norm of each order's projected contribution; slots [b, s, T], orders [T]: what each table hashes."""
        assert self.step is not None
        gathered = gather_rows(self.step, slots)  # [b, s, T, w]
        weight = torch.cat(list(self.parameters()), dim=1).unflatten(1, (len(orders), self.row_width))  # [d, T, w]
        norms = {}
        for order in sorted(set(orders)):
            own = [table for table, other in enumerate(orders) if other == order]
            part = F.linear(gathered[..., own, :].flatten(-2), weight[:, own].flatten(1))
            norms[order] = part.float().norm(dim=-1).mean().item()
        return norms

    def extra_repr(self) -> str:
        added = f", added_tables={list(self.added_tables)}" if self.added_tables else ""
        return (
            f"hidden_size={self.projection.shape[0]}, num_tables={self.num_tables}{added}, "
            f"row_width={self.row_width}, combine={self.combine}"
        )


class ShardedTables:
    """This rank's share of the tables with its exchange and optimizer; drives one step of them.

    Order of calls in a training step: `begin(tokens)`, the forward and backward passes, `collect(scale)`, `apply(...)`.
    In evaluation: `begin(tokens, training=False)` and forward passes. All are collectives of the table group.
    module None: a rank that looks nothing up; it serves its rows all the same, and begins with tokens None.
    device: where the model computes, with its kernels; the shard may lie elsewhere, and has its own.
    ahead: where given, `prefetch(tokens)` may announce the batches of coming steps; a step's numbers are the same without.
    """

    def __init__(
        self,
        module: NgramProjection | None,
        ngram_hash: NgramHash,
        shard: Shard,
        optimizer: RowOptimizer | None,
        exchange: Exchange,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: RowKernels,
        group: dist.ProcessGroup | None = None,
        sequence_slice: tuple[int, int] = (0, 1),
        ahead: Prefetch | None = None,
    ) -> None:
        self.module = module
        self.ngram_hash = ngram_hash
        self.shard = shard
        self.optimizer = optimizer
        self.exchange = exchange
        self.dtype = dtype
        self.device = device
        self.kernels = kernels
        self.group = group
        self.slice_index, self.num_slices = sequence_slice
        self.ahead = ahead
        self.last_plan: Plan | None = None
        self.step: FetchedRows | None = None
        self.snapshot: RowSnapshot | None = None  # being written by a save
        self._touched: tuple[Tensor, Tensor, float] | None = None

    def _ids(self, tokens: Tensor | None, history: Tensor | None = None) -> Tensor:
        """Places in the row space, on the model's device; none [0] for a rank that looks nothing up."""
        if tokens is None:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        ids = self.ngram_hash.rows(tokens, history)
        return ids.chunk(self.num_slices, dim=-2)[self.slice_index]

    def prefetch(self, tokens: Tensor | None) -> None:
        """Announce the tokens of a coming training step, in the order of the steps; `begin` then finds its rows here."""
        if self.ahead is not None:
            self.ahead.start(self._ids(tokens).to(self.shard.device))

    def begin(self, tokens: Tensor | None, *, training: bool = True, history: Tensor | None = None) -> Tensor:
        """Fetch the rows of all of a step's micro-batches: tokens [A, b, s] -> slots [A, b, s / slices, T] int64.

        history [A, b, n - 1]: the tokens before, in decoding. Leading axes are free. tokens None: this rank looks nothing
        up, and gets no slots [0].
        """
        if training and self.ahead is not None and self.ahead.pending:
            return self._keep(*self.ahead.take(), training=True)
        return self.begin_rows(self._ids(tokens, history), training=training)

    def begin_rows(self, ids: Tensor, *, training: bool = True) -> Tensor:
        """The same from places in the row space, of any shape; returns slots of that shape."""
        plan = self.exchange.plan(ids.to(self.shard.device))
        rows, index = self.shard.rows, None
        if self.group is None and rows is not None and self.shard.device == self.device:
            assert isinstance(plan, FlatPlan)
            index = plan.asked  # every row is here, in place
        else:
            rows = TableRows(self.exchange.fetch(plan, self._read))
        return self._keep(plan, rows, index, training=training)

    def _read(self, index: Tensor) -> Tensor:
        return self.shard.read(index, self.dtype)

    def _keep(self, plan: Plan, rows: TableRows, index: Tensor | None = None, *, training: bool) -> Tensor:
        if index is None:
            rows = TableRows(_moved(rows.weight, self.device))
        order = _moved(plan.order, self.device) if training else None
        self._set(FetchedRows(rows, index, plan.count, order, self.dtype, self.kernels))
        self.last_plan = plan
        return _moved(plan.slots, self.device)

    def columns(self) -> dict[str, Tensor]:
        """Everything that belongs to a row, by name: tensors with one row for each of the shard's."""
        assert isinstance(self.shard, TableShard) and self.optimizer is not None
        return {**self.shard.columns(), **self.optimizer.state}

    def _set(self, step: FetchedRows | None) -> None:
        self.step = step
        if self.module is not None:
            self.module.step = step

    def collect(self, scale: float) -> Tensor:
        """After the last backward: gradients, to be taken times `scale`, to their owners.

        Returns the sum of squares over all ranks, float64 scalar, the tables' part of the global norm (contract C5).
        """
        step = self.step
        assert step is not None and step.order is not None and self.last_plan is not None
        own = Sums(*(_moved(part, self.shard.device) for part in step.sums(self.device)))
        index, sums = self.exchange.return_gradients(self.last_plan, own)
        self._touched = (index, sums.total, scale)
        square = (self.shard.kernels.sum(sums.squares) * scale**2).to(self.device)
        if self.group is not None:
            with named("all-reduce of squares", self.group):
                dist.all_reduce(square, group=self.group)
        return square

    def apply(self, learning_rate: float, clip_factor: float) -> None:
        """Update the touched rows with the collected gradients times `clip_factor` (1.0 = not clipped)."""
        assert self._touched is not None, "apply() before collect()"
        assert isinstance(self.shard, TableShard) and self.optimizer is not None
        index, grad, scale = self._touched
        self._touched = None
        self._set(None)
        if self.ahead is not None:
            self.ahead.wait()  # what it still reads is about to change
        snapshot = self.snapshot  # once: the thread that writes it takes it away when it is done
        if snapshot is not None:
            snapshot.preserve(index)
        self.optimizer.update(index, grad, learning_rate, scale * clip_factor)
        if self.ahead is not None:
            self.ahead.refresh(index)

    def num_touched(self) -> int:
        """How many of this rank's rows were ever updated."""
        assert isinstance(self.shard, TableShard)
        return self.shard.num_touched()

    def payload_bytes(self, plan: Plan) -> int:
        """What this rank sends for a step to other ranks: rows travel in the model's dtype."""
        width = self.ngram_hash.space.width
        return self.exchange.payload_bytes(
            plan, width * self.dtype.itemsize, width * self.exchange.gradient_dtype.itemsize
        )

    def contribution_norms(self, tokens: Tensor | None) -> dict[int, float]:
        """Mean L2 norm of each order's projected contribution over tokens [A, b, s], before combination.

        A collective, as begin() is; a rank without a module gets nothing.
        """
        slots = self.begin(tokens, training=False)
        norms = {} if self.module is None else self.module.order_norms(slots, self.ngram_hash.space.orders)
        self._set(None)
        return norms


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On another device, by a copy that others may overlap; the tensor itself where it is there already."""
    if tensor.device == device:
        return tensor
    if device.type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
