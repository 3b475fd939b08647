"""The over-encoder: a small module that the model sees, and the sharded tables that feed it once a step.

`OverEncoding` holds only the projection; `OverTables` holds this rank's rows, their optimizer and the exchange. They meet in
`StepRows`, the unique rows of a step with one gradient buffer: forward gathers from it and backward adds into it, with
no communication in either (contract C3).

Shapes: A micro-batches, b batch, s sequence (a slice of it under tensor parallelism), T tables, w row width,
d hidden = T w, U unique rows.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.ngram.exchange import ExchangePlan, RowExchange
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.optimizer import RowOptimizer
from overtok_megatron.ngram.snapshot import RowSnapshot
from overtok_megatron.ngram.table import TableShard
from overtok_megatron.parallel.collectives import copy_to_group, named
from overtok_megatron.parallel.sharding import initialise

Combine = Literal["sum", "mean", "scaled"]


@dataclass
class StepRows:
    """The rows of one step: rows [U, w] float32, a leaf; grad [U, w] float32, summed over micro-batches."""

    rows: Tensor
    grad: Tensor | None
    cast: Tensor  # the rows in the dtype of the model, made once a step
    kernels: RowKernels


class _GatherRows(torch.autograd.Function):
    """Forward: cast[slots]. Backward: adds into step.grad; the leaf itself receives no gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, step: StepRows, slots: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(slots)
        return F.embedding(slots, step.cast)  # [b, s, T, w]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (slots,) = ctx.saved_tensors
        step: StepRows = ctx.step
        assert step.grad is not None, "backward through rows that were fetched without a gradient"
        step.kernels.add(step.grad, slots.reshape(-1), grad.reshape(-1, grad.shape[-1]))
        return None, None, None


def gather_rows(step: StepRows, slots: Tensor) -> Tensor:
    """slots int64 of any shape into a step's rows -> [*slots, w] in the model's dtype; backward adds into the step."""
    gathered: Tensor = _GatherRows.apply(step.rows, step, slots)
    return gathered


class OverEncoding(nn.Module):
    """Joins the gathered n-gram rows to the 1-gram embedding (paper section 3.2; METHOD of combination is a switch).

    The T projections W_s: w -> d, summed, are one d x d linear on the concatenation of the rows. combine: "sum" e + o;
    "mean" (e + o) / (1 + T), the paper's pseudo-code; "scaled" e + o / (1 + T). group: the tensor-parallel group, whose
    ranks each see their own slice of the sequence.
    """

    def __init__(
        self, hidden_size: int, num_tables: int, *, combine: Combine, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        assert hidden_size % num_tables == 0
        self.num_tables = num_tables
        self.combine = combine
        self.group = group
        self.projection = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.step: StepRows | None = None

    def reset(self, seed: int, name: str) -> None:
        """Deviation d^-1/2: the n-gram part begins at the scale of its rows."""
        size = self.projection.shape[0]
        initialise(self.projection, size**-0.5, seed, f"{name}.projection")

    def forward(self, slots: Tensor) -> Tensor:
        """The n-gram part before combination: slots [b, s, T] int64 into the step's rows -> [b, s, d]."""
        assert self.step is not None, "no rows were fetched for this step"
        gathered = gather_rows(self.step, slots)  # [b, s, T, w]
        weight = copy_to_group(self.projection, self.group)  # each rank saw a slice: the gradient is summed
        return F.linear(gathered.flatten(-2), weight)

    def join(self, base: Tensor, ngrams: Tensor) -> Tensor:
        """base, ngrams [b, s, d] -> [b, s, d] by the combination rule."""
        share = 1.0 / (1 + self.num_tables)
        if self.combine == "sum":
            return base + ngrams
        if self.combine == "mean":
            return (base + ngrams) * share
        return torch.add(base, ngrams, alpha=share)

    @torch.no_grad()
    def order_norms(self, slots: Tensor, num_slices: int) -> Tensor:
        """Mean L2 norm of each order's projected contribution, [n-1] float32; slots [b, s, T]."""
        assert self.step is not None
        gathered = F.embedding(slots, self.step.cast).flatten(-2)  # [b, s, d]
        width = gathered.shape[-1] // self.num_tables * num_slices
        parts = zip(gathered.split(width, dim=-1), self.projection.split(width, dim=1), strict=True)
        return torch.stack([F.linear(part, weight).float().norm(dim=-1).mean() for part, weight in parts])

    def extra_repr(self) -> str:
        return f"hidden_size={self.projection.shape[0]}, num_tables={self.num_tables}, combine={self.combine}"


class OverTables:
    """This rank's share of the tables with its exchange and optimizer; drives one step of them.

    Order of calls in a training step: `begin(tokens)`, the forward and backward passes, `collect(scale)`, `apply(...)`.
    In evaluation: `begin(tokens, training=False)` and forward passes. All are collectives of the table group.
    module None: a rank that looks nothing up; it serves its rows all the same, and begins with tokens None.
    """

    def __init__(
        self,
        module: OverEncoding | None,
        ngram_hash: NgramHash,
        shard: TableShard,
        optimizer: RowOptimizer,
        exchange: RowExchange,
        *,
        dtype: torch.dtype,
        sequence_slice: tuple[int, int] = (0, 1),
    ) -> None:
        self.module = module
        self.ngram_hash = ngram_hash
        self.shard = shard
        self.optimizer = optimizer
        self.exchange = exchange
        self.dtype = dtype
        self.slice_index, self.num_slices = sequence_slice
        self.last_plan: ExchangePlan | None = None
        self.step: StepRows | None = None
        self.snapshot: RowSnapshot | None = None  # being written by a save
        self._touched: tuple[Tensor, Tensor] | None = None

    def begin(self, tokens: Tensor | None, *, training: bool = True, history: Tensor | None = None) -> Tensor:
        """Fetch the rows of all of a step's micro-batches: tokens [A, b, s] -> slots [A, b, s / slices, T] int64.

        history [A, b, n - 1]: the tokens before, in decoding. Leading axes are free. tokens None: this rank looks nothing
        up, and gets no slots [0].
        """
        if tokens is None:
            ids = torch.empty(0, dtype=torch.int64, device=self.shard.weight.device)
        else:
            ids = self.ngram_hash.rows(tokens, history)
            ids = ids.chunk(self.num_slices, dim=-2)[self.slice_index]
        return self.begin_rows(ids, training=training)

    def begin_rows(self, ids: Tensor, *, training: bool = True) -> Tensor:
        """The same from global row numbers of any shape; returns slots of that shape."""
        plan = self.exchange.plan(ids)
        rows = self.exchange.fetch(plan, self.shard.weight).requires_grad_(training)
        grad = torch.zeros_like(rows, requires_grad=False) if training else None
        self._keep(StepRows(rows, grad, rows.detach().to(self.dtype), self.exchange.kernels))
        self.last_plan = plan
        return plan.slots

    def columns(self) -> dict[str, Tensor]:
        """Everything that belongs to a row, by name: tensors with one row for each of the shard's."""
        return {"weight": self.shard.weight, "touched": self.shard.touched, **self.optimizer.state}

    def _keep(self, step: StepRows | None) -> None:
        self.step = step
        if self.module is not None:
            self.module.step = step

    def collect(self, scale: float) -> Tensor:
        """After the last backward: gradients, times `scale`, to their owners.

        Returns the sum of squares over all ranks, float64 scalar, the tables' part of the global norm (contract C5).
        """
        step = self.step
        assert step is not None and step.grad is not None and self.last_plan is not None
        rows, grad = self.exchange.return_gradients(self.last_plan, step.grad)
        if scale != 1.0:
            grad.mul_(scale)
        self._touched = (rows, grad)
        square = self.exchange.kernels.square_sum(grad)
        if self.exchange.group is not None:
            with named("all-reduce of squares", self.exchange.group):
                dist.all_reduce(square, group=self.exchange.group)
        return square

    def apply(self, learning_rate: float, clip_factor: float) -> None:
        """Update the touched rows with the collected gradients times `clip_factor` (1.0 = not clipped)."""
        assert self._touched is not None, "apply() before collect()"
        rows, grad = self._touched
        self._touched = None
        self._keep(None)
        if clip_factor != 1.0:
            grad.mul_(clip_factor)
        snapshot = self.snapshot  # once: the thread that writes it takes it away when it is done
        if snapshot is not None:
            snapshot.preserve(rows)
        self.optimizer.update(rows, grad, learning_rate)
        self.shard.touched[rows] = True
        self.shard.changed[rows] = True

    def contribution_norms(self, tokens: Tensor | None) -> list[float]:
        """Mean L2 norm of each order's projected contribution over tokens [A, b, s], before combination; 2-grams first.

        A collective, as begin() is; a rank without a module gets nothing.
        """
        slots = self.begin(tokens, training=False)
        norms = [] if self.module is None else self.module.order_norms(slots, self.ngram_hash.space.num_slices).tolist()
        self._keep(None)
        return norms
