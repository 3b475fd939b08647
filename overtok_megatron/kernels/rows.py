"""What a training step does with rows of the n-gram tables, in torch's operators, on any device.

These operators define what the compiled forms (cpu_rows.py, triton_rows.py) compute, are their test oracle, and run where
there is no compiled form.

Shapes: N look-ups, U distinct rows among them, m rows of a rank, r of them touched, w row width, T tables, n longest n-gram.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RowRule = Literal["rowwise_adagrad", "rowwise_adam", "adam", "sgd"]
_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
CHANGED = 3  # flag of an updated row
SCATTER = (
    2533  # stripe k lies at position k * SCATTER modulo their number: the golden section of ngram.row_space.STRIPES
)


@dataclass(frozen=True)
class TableRows:
    """The rows of one rank as they are stored.

    weight [m, w] float32, bfloat16, or int8 with scale [m] float32 (a row is scale times weight; else None). first_row_id:
    the row id of local row 0. Row ids key the rounding, so that it does not depend on which rank owns a row. flags [m]
    uint8: an update sets the flags of its rows to CHANGED; None where nobody reads them.
    """

    weight: Tensor
    scale: Tensor | None = None
    first_row_id: int = 0
    flags: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RowStep:
    """The numbers of one step of a row optimizer. Gradients are multiplied by grad_factor first.

    rowwise_adagrad: s += mean(g^2); row = decay row - rate g / (sqrt(s) + eps).
    adam: m, v per element, row = decay row - rate m / (sqrt(v) + eps), rate with the bias correction in it.
    rowwise_adam: the same with one v per row, of mean(g^2). sgd: row = decay row - rate g.
    noise: 32 bits made of seed and step (`noise_key`), which key the stochastic rounding of rows and states that are stored
    in fewer bits than float32.
    """

    rule: RowRule
    rate: float
    decay: float
    betas: tuple[float, float]
    eps: float
    grad_factor: float
    noise: int


@dataclass(frozen=True, kw_only=True)
class HashTables:
    """n-gram tables as numbers: table t hashes n-grams of order orders[t] to sizes[t] rows; `row_id` gives their row ids.

    base: p of the polynomial. pad_id stands for missing tokens; reset: everything up to and including the last eod_id
    before a position is hidden. stripes: over how many stripes of the row space the rows are interleaved.
    """

    orders: tuple[int, ...]
    sizes: tuple[int, ...]
    base: int
    pad_id: int
    reset: bool
    eod_id: int
    stripes: int


class DistinctIds(NamedTuple):
    """The distinct ids among N look-ups.

    ids [U] int64, ascending. slots int64: the index of each look-up's id there. sorted_lookups [N] int64: the look-ups
    ordered by slot, each packed as slot * 2^32 + look-up, ascending.
    """

    ids: Tensor
    slots: Tensor
    sorted_lookups: Tensor


class RowGradientSums(NamedTuple):
    """Gradients summed by row: total [U, w] float32, and squares [U] float32, the sum of squares of each row of total."""

    total: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, count: int, width: int, device: torch.device) -> "RowGradientSums":
        """Memory for sums, not yet filled."""
        return cls(torch.empty(count, width, device=device), torch.empty(count, device=device))


def row_id(table: int, row: Tensor, sizes: tuple[int, ...], stripes: int) -> Tensor:
    """Row ids of rows [..] int64 of a table, int64: the row's index in the row space that all tables share.

    Rows are numbered round robin over the tables (row 0 of every table, row 1 of every table, ..; the rows that a table has
    beyond the smallest table come last). Consecutive numbers then go to consecutive stripes, and the stripes lie one after
    the other in a scattered order; the last numbers, which do not fill every stripe, follow at the end. Every contiguous
    range of the row space thus holds its share of every table and of frequent and rare n-grams. stripes: not a multiple of
    17 or 149, the factors of SCATTER.
    """
    smallest = min(sizes)
    beyond = sum(size - smallest for size in sizes[:table]) + len(sizes) * smallest - smallest
    number = torch.where(row < smallest, row * len(sizes) + table, row + beyond)
    length = sum(sizes) // stripes
    position = number % stripes * SCATTER % stripes
    return torch.where(number < length * stripes, position * length + number // stripes, number)


def table_rows_of(row_ids: Tensor, sizes: tuple[int, ...], stripes: int) -> tuple[Tensor, Tensor]:
    """The inverse of `row_id`: the tables of row ids [..] int64 and their rows within these tables, both int64 [..]."""
    smallest, length = min(sizes), sum(sizes) // stripes
    stripe = row_ids // max(length, 1) * pow(SCATTER, -1, stripes) % stripes
    number = torch.where(row_ids < length * stripes, row_ids % max(length, 1) * stripes + stripe, row_ids)
    beyond = torch.tensor([0, *(size - smallest for size in sizes)], device=row_ids.device).cumsum(0)
    over = number - len(sizes) * smallest  # index among the rows beyond the smallest table
    long = torch.searchsorted(beyond, over, right=True) - 1
    tables = torch.where(over < 0, number % len(sizes), long)
    return tables, torch.where(over < 0, number // len(sizes), over - beyond[long] + smallest)


def mix(value: int) -> int:
    """A hash of 32 bits (the multipliers of Chris Wellons' "lowbias32", public domain)."""
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK
    return value ^ (value >> 16)


def noise_key(seed: int, step: int) -> int:
    """32 bits for one step of a run."""
    return mix(mix(seed & _MASK) ^ (step & _MASK))


def _mix(values: Tensor) -> Tensor:
    values = ((values ^ (values >> 16)) * 0x7FEB352D) & _MASK
    values = ((values ^ (values >> 15)) * 0x846CA68B) & _MASK  # products wrap, their low 32 bits are right
    return values ^ (values >> 16)


def noise(key: int, row_ids: Tensor, first_column: int, columns: int) -> Tensor:
    """Random bits, 32 as int64 [r, columns], for each column of rows with ids [r] int64; they depend on key, id and column."""
    of_row = _mix(_mix((row_ids & _MASK) ^ key) ^ (row_ids >> 32))
    column = torch.arange(first_column, first_column + columns, device=row_ids.device) * _GOLDEN
    return _mix((of_row.unsqueeze(1) + column) & _MASK)


def round_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Round float32 values to bfloat16 stochastically: unbiased. bits: 32 random bits for each value, int64."""
    raw = values.view(torch.int32).to(torch.int64)
    raised = (raw + (bits >> 16)) & 0xFFFF0000
    rounded = (raised - ((raised >> 31) << 32)).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def round_int8(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Round float32 values [r, w] to int8 [r, w] with a scale [r] float32, stochastically as round_bfloat16 does."""
    scale = values.abs().amax(dim=1) * (1.0 / 127.0)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    lifted = values * inverse.unsqueeze(1) + (bits >> 8).float() * 2.0**-24
    return lifted.floor().clamp(-127, 127).to(torch.int8), scale


class RowKernels:
    """torch's operators. Results are deterministic: a row's gradients are added in the order of its look-ups."""

    def windows(self, extended: Tensor, tables: HashTables) -> list[Tensor]:
        """x_t, x_{t-1}, .., x_{t-n+1} of extended [b, n-1+s] int64 (MISSING is below 0) -> n tensors [b, s] int64."""
        reach = max(tables.orders) - 1
        length = extended.shape[-1] - reach
        visible = torch.ones_like(extended[..., reach:], dtype=torch.bool)
        result = []
        for back in range(reach + 1):
            token = extended.narrow(-1, reach - back, length)  # [b, s]
            present = token >= 0
            if back > 0 and tables.reset:
                visible = visible & present & (token != tables.eod_id)
                present = visible
            result.append(torch.where(present, token, tables.pad_id))
        return result

    def ngram_row_ids(self, extended: Tensor, tables: HashTables) -> Tensor:
        """Row ids [b, s, T] int64 of the n-grams of extended [b, n-1+s] int64.

        The polynomial is reduced at every Horner step: every intermediate is below 2^62, as rows per table are below 2^31.
        """
        window = self.windows(extended, tables)
        result = []
        for table, (order, size) in enumerate(zip(tables.orders, tables.sizes, strict=True)):
            base = tables.base % size
            row = window[order - 1] % size
            for back in range(order - 2, -1, -1):
                row = (row * base + window[back]) % size
            result.append(row_id(table, row, tables.sizes, tables.stripes))
        return torch.stack(result, dim=-1)

    def unique(self, ids: Tensor, limit: int) -> DistinctIds:
        """The distinct ones of ids, int64 of any shape, in [0, limit)."""
        ascending, lookups = ids.reshape(-1).sort(stable=True)
        first = torch.ones_like(ascending, dtype=torch.bool)
        torch.ne(ascending[1:], ascending[:-1], out=first[1:])
        slot = first.cumsum(0) - 1
        slots = torch.empty_like(slot).scatter_(0, lookups, slot).view(ids.shape)
        return DistinctIds(ascending[first], slots, slot << 32 | lookups)

    def fetch(self, rows: TableRows, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Local rows index [r] int64 as [r, w] of a dtype, float32 or bfloat16."""
        values = rows.weight.index_select(0, index)
        if rows.scale is not None:
            values = values.float() * rows.scale.index_select(0, index).unsqueeze(1)
        return values.to(dtype)

    def sort_lookups(self, slots: Tensor, count: int) -> Tensor:
        """sorted_lookups [N], as in `DistinctIds`, of look-ups with slots [N] int64 below count."""
        flat = slots.reshape(-1)
        return (flat << 32 | torch.arange(flat.numel(), device=flat.device)).sort().values

    def gather(
        self,
        rows: TableRows,
        index: Tensor | None,
        slots: Tensor,
        dtype: torch.dtype,
        sorted_lookups: Tensor | None = None,
    ) -> Tensor:
        """Row index[slots] (row `slots` without an index) for slots int64 of any shape -> [*slots, w] of a dtype.

        sorted_lookups: of these slots, where they are known; a compiled form may then read each row just once.
        """
        where = slots if index is None else index[slots]
        if rows.scale is None:
            return F.embedding(where, rows.weight).to(dtype)
        return self.fetch(rows, where.reshape(-1), dtype).view(*slots.shape, rows.weight.shape[1])

    def add(self, sums: RowGradientSums, sorted_lookups: Tensor, grad: Tensor, *, fresh: bool = False) -> None:
        """sums += grad [N, w] float32 or bfloat16: the gradient of each look-up goes to its slot, in the sorted order.

        fresh: the sums hold nothing yet; rows without a look-up become zero.
        """
        total = sums.total
        if total.numel() == 0:
            return
        # not index_add_, which on CUDA adds in any order
        counts = torch.bincount(sorted_lookups >> 32, minlength=total.shape[0])
        values = grad[sorted_lookups & _MASK].float()
        added = torch.segment_reduce(values, "sum", lengths=counts, axis=0, initial=0.0)
        if fresh:
            total.copy_(added)
        else:
            total.add_(added)
        torch.sum(total.square(), dim=1, out=sums.squares)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a float32 tensor as a float64 scalar, deterministic."""
        return values.double().sum()

    def update(self, rows: TableRows, state: dict[str, Tensor], index: Tensor, grad: Tensor, step: RowStep) -> None:
        """One optimizer step, in place, on local rows index [r] int64, distinct, with gradients grad [r, w] float32.

        state: square_sum [m] of rowwise_adagrad; exp_avg [m, w] with exp_avg_sq [m, w] of adam, [m] of rowwise_adam;
        float32 or bfloat16.
        """
        grad = grad * step.grad_factor
        values = self.fetch(rows, index, torch.float32) * step.decay
        beta1, beta2 = step.betas
        news: dict[str, Tensor] = {}
        if step.rule == "sgd":
            values.sub_(grad, alpha=step.rate)
        elif step.rule == "rowwise_adagrad":
            sums = state["square_sum"][index].float() + grad.square().mean(dim=1)  # [r]
            values.sub_(grad * (step.rate / (sums.sqrt() + step.eps)).unsqueeze(1))
            news["square_sum"] = sums
        else:
            squares = grad.square()
            if step.rule == "rowwise_adam":
                squares = squares.mean(dim=1)
            mean = beta1 * state["exp_avg"][index].float() + (1.0 - beta1) * grad
            square = beta2 * state["exp_avg_sq"][index].float() + (1.0 - beta2) * squares
            size = step.rate / (square.sqrt() + step.eps)
            values.sub_(mean * (size if step.rule == "adam" else size.unsqueeze(1)))
            news |= {"exp_avg": mean, "exp_avg_sq": square}
        self._store(rows, state, index, values, news, step.noise)

    def _store(
        self,
        rows: TableRows,
        state: dict[str, Tensor],
        index: Tensor,
        values: Tensor,
        news: dict[str, Tensor],
        key: int,
    ) -> None:
        width, row_ids = values.shape[1], index + rows.first_row_id
        if rows.weight.dtype == torch.float32:
            rows.weight.index_copy_(0, index, values)
        elif rows.scale is None:
            rows.weight.index_copy_(0, index, round_bfloat16(values, noise(key, row_ids, 0, width)))
        else:
            stored, scale = round_int8(values, noise(key, row_ids, 0, width))
            rows.weight.index_copy_(0, index, stored)
            rows.scale.index_copy_(0, index, scale)
        if rows.flags is not None:
            rows.flags.index_fill_(0, index, CHANGED)
        for number, (name, new) in enumerate(news.items(), start=1):
            if state[name].dtype == torch.bfloat16:
                bits = noise(key, row_ids, number * width, new.shape[1] if new.ndim > 1 else 1)
                new = round_bfloat16(new, bits.view(new.shape))
            state[name].index_copy_(0, index, new)
