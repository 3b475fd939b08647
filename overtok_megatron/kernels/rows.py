"""What a step does with rows of the n-gram tables, in torch's operators, on any device.

This is the meaning of the compiled forms (cpu_rows.py, triton_rows.py), their test oracle, and what serves without them.

Shapes: N look-ups, U distinct rows of them, m rows of a shard, w row width, T tables, n longest n-gram.
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
SCATTER = 2533  # neighbouring heaps lie so many heaps apart: the golden section of ngram.sizing's 4099


@dataclass(frozen=True)
class TableRows:
    """The rows of one shard as they are stored.

    weight [m, w] float32, bfloat16, or int8 with scale [m] float32 (a row is scale times weight; else None). first: the
    place of row 0 in the row space, which keys the rounding, so that it does not depend on who owns a row. flags [m] uint8:
    an update sets those of its rows to CHANGED; None where nobody asks.
    """

    weight: Tensor
    scale: Tensor | None = None
    first: int = 0
    flags: Tensor | None = None


@dataclass(frozen=True)
class RowStep:
    """One step of a row optimizer, all but the rows. Gradients are multiplied by grad_factor first.

    rowwise_adagrad: s += mean(g^2); row = decay row - rate g / (sqrt(s) + eps).
    adam: m, v per element, row = decay row - rate m / (sqrt(v) + eps), rate with the bias correction in it.
    rowwise_adam: the same with one v a row, of mean(g^2). sgd: row = decay row - rate g.
    noise: 32 bits made of seed and step (`noise_key`), with which what is stored in fewer bits is rounded stochastically.
    """

    rule: RowRule
    rate: float
    decay: float
    betas: tuple[float, float]
    eps: float
    grad_factor: float
    noise: int


@dataclass(frozen=True)
class HashTables:
    """n-gram tables as numbers: of table t, orders[t] tokens are hashed to sizes[t] rows, which lie at `place` (see there).

    base: p of the polynomial. pad_id stands for missing tokens; reset: nothing up to and including the last eod_id
    before a position is seen. stripes: how the rows are dealt over the row space.
    """

    orders: tuple[int, ...]
    sizes: tuple[int, ...]
    base: int
    pad_id: int
    reset: bool
    eod_id: int
    stripes: int


class Distinct(NamedTuple):
    """What is distinct among N look-ups.

    ids [U] int64, ascending. slots int64: the place of each look-up's id there. order [N] int64: the look-ups of each
    slot brought together, slot * 2^32 + look-up, ascending.
    """

    ids: Tensor
    slots: Tensor
    order: Tensor


class Sums(NamedTuple):
    """Gradients added up by rows: total [U, w] float32, and squares [U] float32, of each row of it the sum of squares."""

    total: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, count: int, width: int, device: torch.device) -> "Sums":
        """Room for sums that hold nothing yet."""
        return cls(torch.empty(count, width, device=device), torch.empty(count, device=device))


def place(table: int, row: Tensor, sizes: tuple[int, ...], stripes: int) -> Tensor:
    """Place in the row space of rows [..] int64 of a table, int64.

    Rows are counted across the tables (row 0 of every table, row 1 of every table, ..; what a table has beyond the
    smallest comes last) and then dealt like cards into `stripes` heaps, which lie one after the other in a scattered
    order; the last cards, which do not go round, lie behind. So every contiguous range of the row space has its share of
    every table and of frequent and rare n-grams. stripes: no multiple of 17 or 149, the factors of the scattering step.
    """
    smallest = min(sizes)
    beyond = sum(size - smallest for size in sizes[:table]) + len(sizes) * smallest - smallest
    count = torch.where(row < smallest, row * len(sizes) + table, row + beyond)
    length = sum(sizes) // stripes
    heap = count % stripes * SCATTER % stripes
    return torch.where(count < length * stripes, heap * length + count // stripes, count)


def table_rows_at(places: Tensor, sizes: tuple[int, ...], stripes: int) -> tuple[Tensor, Tensor]:
    """The inverse of `place`: tables and their rows, int64 [..] both, that lie at places [..] int64 of the row space."""
    smallest, length = min(sizes), sum(sizes) // stripes
    heap = places // max(length, 1) * pow(SCATTER, -1, stripes) % stripes
    count = torch.where(places < length * stripes, places % max(length, 1) * stripes + heap, places)
    beyond = torch.tensor([0, *(size - smallest for size in sizes)], device=places.device).cumsum(0)
    over = count - len(sizes) * smallest  # place among the rows beyond the smallest table
    long = torch.searchsorted(beyond, over, right=True) - 1
    tables = torch.where(over < 0, count % len(sizes), long)
    return tables, torch.where(over < 0, count // len(sizes), over - beyond[long] + smallest)


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


def noise(key: int, rows: Tensor, first_column: int, columns: int) -> Tensor:
    """32 bits, as int64 [r, columns], for each column of rows [r] int64 (places in the row space)."""
    of_row = _mix(_mix((rows & _MASK) ^ key) ^ (rows >> 32))
    column = torch.arange(first_column, first_column + columns, device=rows.device) * _GOLDEN
    return _mix((of_row.unsqueeze(1) + column) & _MASK)


def round_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """float32 values -> bfloat16, up or down with the odds of their distance; bits: 32 random ones each, int64."""
    raw = values.view(torch.int32).to(torch.int64)
    raised = (raw + (bits >> 16)) & 0xFFFF0000
    rounded = (raised - ((raised >> 31) << 32)).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def round_int8(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """float32 values [r, w] -> int8 [r, w] and their scale [r] float32, rounded as round_bfloat16 does."""
    scale = values.abs().amax(dim=1) * (1.0 / 127.0)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    lifted = values * inverse.unsqueeze(1) + (bits >> 8).float() * 2.0**-24
    return lifted.floor().clamp(-127, 127).to(torch.int8), scale


class RowKernels:
    """torch's operators. Every result is the same at every run; the order of a row's gradients is that of the look-ups."""

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

    def ngram_rows(self, extended: Tensor, tables: HashTables) -> Tensor:
        """Places in the row space [b, s, T] int64 of the n-grams of extended [b, n-1+s] int64.

        Reduced at every Horner step: every intermediate is below 2^62, as rows per table are below 2^31.
        """
        window = self.windows(extended, tables)
        result = []
        for table, (order, size) in enumerate(zip(tables.orders, tables.sizes, strict=True)):
            base = tables.base % size
            row = window[order - 1] % size
            for back in range(order - 2, -1, -1):
                row = (row * base + window[back]) % size
            result.append(place(table, row, tables.sizes, tables.stripes))
        return torch.stack(result, dim=-1)

    def unique(self, ids: Tensor, limit: int) -> Distinct:
        """ids int64 of any shape, in [0, limit)."""
        ascending, places = ids.reshape(-1).sort(stable=True)
        first = torch.ones_like(ascending, dtype=torch.bool)
        torch.ne(ascending[1:], ascending[:-1], out=first[1:])
        slot = first.cumsum(0) - 1
        slots = torch.empty_like(slot).scatter_(0, places, slot).view(ids.shape)
        return Distinct(ascending[first], slots, slot << 32 | places)

    def fetch(self, rows: TableRows, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows index [r] int64 as [r, w] of a dtype, float32 or bfloat16."""
        values = rows.weight.index_select(0, index)
        if rows.scale is not None:
            values = values.float() * rows.scale.index_select(0, index).unsqueeze(1)
        return values.to(dtype)

    def order(self, slots: Tensor, count: int) -> Tensor:
        """The order, as in `Distinct`, of look-ups whose slots [N] int64, below count, are known."""
        flat = slots.reshape(-1)
        return (flat << 32 | torch.arange(flat.numel(), device=flat.device)).sort().values

    def gather(
        self, rows: TableRows, index: Tensor | None, slots: Tensor, dtype: torch.dtype, order: Tensor | None = None
    ) -> Tensor:
        """Row index[slots] (slots itself without an index) for slots int64 of any shape -> [*slots, w] of a dtype.

        order: of these slots, where it is known; a form of these kernels may read each row just once then.
        """
        where = slots if index is None else index[slots]
        if rows.scale is None:
            return F.embedding(where, rows.weight).to(dtype)
        return self.fetch(rows, where.reshape(-1), dtype).view(*slots.shape, rows.weight.shape[1])

    def add(self, sums: Sums, order: Tensor, grad: Tensor, *, fresh: bool = False) -> None:
        """sums += grad [N, w] float32 or bfloat16, row by row to the slots of `order`, in its order.

        fresh: they hold nothing yet; rows without a look-up become zero.
        """
        total = sums.total
        if total.numel() == 0:
            return
        counts = torch.bincount(order >> 32, minlength=total.shape[0])  # index_add_ would add in any order on CUDA
        values = grad[order & _MASK].float()
        added = torch.segment_reduce(values, "sum", lengths=counts, axis=0, initial=0.0)
        if fresh:
            total.copy_(added)
        else:
            total.add_(added)
        torch.sum(total.square(), dim=1, out=sums.squares)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a float32 tensor, float64 scalar, the same at every run."""
        return values.double().sum()

    def update(self, rows: TableRows, state: dict[str, Tensor], index: Tensor, grad: Tensor, step: RowStep) -> None:
        """One optimizer step on rows index [r] int64, distinct, with gradients grad [r, w] float32; in place.

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
        width, places = values.shape[1], index + rows.first
        if rows.weight.dtype == torch.float32:
            rows.weight.index_copy_(0, index, values)
        elif rows.scale is None:
            rows.weight.index_copy_(0, index, round_bfloat16(values, noise(key, places, 0, width)))
        else:
            stored, scale = round_int8(values, noise(key, places, 0, width))
            rows.weight.index_copy_(0, index, stored)
            rows.scale.index_copy_(0, index, scale)
        if rows.flags is not None:
            rows.flags.index_fill_(0, index, CHANGED)
        for number, (name, new) in enumerate(news.items(), start=1):
            if state[name].dtype == torch.bfloat16:
                bits = noise(key, places, number * width, new.shape[1] if new.ndim > 1 else 1)
                new = round_bfloat16(new, bits.view(new.shape))
            state[name].index_copy_(0, index, new)
