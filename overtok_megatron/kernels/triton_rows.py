"""Rows of the n-gram tables on CUDA through Triton: same signatures and meaning as rows.py.

There are no atomics: every sum has a fixed order, so that a run gives the same bits again. Square roots and divisions are those
of IEEE 754 (tl.sqrt and / are approximations on CUDA). Triton chooses the order in which a row's squares are added, which
differs from the order on the CPU. Importing this module needs the package triton, which torch's CUDA builds bring along.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from overtok_megatron.kernels.rows import (
    CHANGED,
    SCATTER,
    HashTables,
    RowGradientSums,
    RowKernels,
    RowStep,
    StoredRows,
)

_TILE = 2048  # how many values a program holds at a time
_LOOKUPS = tl.constexpr(16)  # look-ups of one row that are added at a time
_SCATTER = tl.constexpr(SCATTER)
_FLAG = tl.constexpr(CHANGED)
_GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def _mix(value):
    value = (value ^ (value >> 16)) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def _row_noise(row_ids, key):
    return _mix(_mix(row_ids.to(tl.uint32) ^ key.to(tl.uint32)) ^ (row_ids >> 32).to(tl.uint32))


@triton.jit
def _column_noise(of_row, column):
    return _mix(of_row + column.to(tl.uint32) * _GOLDEN)


@triton.jit
def _state_noise(of_row, COLUMN: tl.constexpr):
    return _column_noise(of_row, tl.full([], COLUMN, tl.uint32))


@triton.jit
def _round_bfloat16(values, bits):
    raw = values.to(tl.uint32, bitcast=True)
    raised = tl.where((raw & 0x7F800000) == 0x7F800000, raw, raw + (bits >> 16))
    return (raised >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _store_state(state, at, values, bits, mask):
    if state.dtype.element_ty == tl.bfloat16:
        tl.store(state + at, _round_bfloat16(values, bits), mask=mask)
    else:
        tl.store(state + at, values, mask=mask)


@triton.jit(do_not_specialize=["positions", "length"])
def ngram_row_ids_kernel(
    extended, numbers, out, positions, length, base, pad_id, eod_id, stripes, total, smallest,
    TABLES: tl.constexpr, LONGEST: tl.constexpr, RESET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row ids of one table at a block of positions. numbers [T, 3]: order, size, what `row_id` adds beyond the smallest."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    table = tl.program_id(1)
    mask = at < positions
    order = tl.load(numbers + table * 3)
    size = tl.load(numbers + table * 3 + 1)
    beyond = tl.load(numbers + table * 3 + 2)
    token = extended + at // length * (length + LONGEST - 1) + at % length + LONGEST - 1
    row = tl.zeros([BLOCK], dtype=tl.int64)
    power = tl.full([], 1, tl.int64)
    visible = mask
    for back in tl.static_range(LONGEST):
        value = tl.load(token - back, mask=mask, other=0)
        present = value >= 0
        if back > 0 and RESET:
            visible = visible & present & (value != eod_id)
            present = visible
        value = tl.where(present, value, pad_id)
        row = tl.where(back < order, (row + value % size * power) % size, row)
        power = power * (base % size) % size
    number = tl.where(row < smallest, row * TABLES + table, row + beyond)
    stripe_rows = total // stripes
    position = number % stripes * _SCATTER % stripes
    row_id = tl.where(number < stripe_rows * stripes, position * stripe_rows + number // stripes, number)
    tl.store(out + at * TABLES + table, row_id, mask=mask)


@triton.jit(do_not_specialize=["count"])  # another number per step must not compile another kernel
def gather_kernel(
    weight, scale, index, slots, out, count,
    INDEXED: tl.constexpr, SCALED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Row index[slots[i]], or slots[i], as row i of the result, in its dtype."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = at < count
    row = tl.load(slots + at, mask=here, other=0)
    if INDEXED:
        row = tl.load(index + row, mask=here, other=0)
    columns = tl.arange(0, COLUMNS)
    mask = here[:, None] & (columns < WIDTH)[None, :]
    values = tl.load(weight + row[:, None] * WIDTH + columns[None, :], mask=mask, other=0)
    if SCALED:
        values = values.to(tl.float32) * tl.load(scale + row, mask=here, other=0.0)[:, None]
    tl.store(out + at[:, None] * WIDTH + columns[None, :], values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_kernel(
    grad, sorted_lookups, ends, total, squares, FRESH: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One row: its look-ups are sorted_lookups[ends[row - 1] : ends[row]]."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(ends + row - 1, mask=row > 0, other=0)
    end = tl.load(ends + row)
    columns = tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    lines = tl.arange(0, _LOOKUPS)
    added = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(begin, end, _LOOKUPS):
        here = first + lines < end
        lookup = tl.load(sorted_lookups + first + lines, mask=here, other=0) & 0xFFFFFFFF
        mask = here[:, None] & inside[None, :]
        values = tl.load(grad + lookup[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
        added += tl.sum(values.to(tl.float32), axis=0)
    sum_at = total + row * WIDTH + columns
    if not FRESH:
        added += tl.load(sum_at, mask=inside, other=0.0)
    tl.store(sum_at, added, mask=inside)
    tl.store(squares + row, tl.sum(tl.where(inside, added * added, 0.0), axis=0))


@triton.jit(do_not_specialize=["count", "key", "first_row_id"])
def update_kernel(
    weight, scale, flags, first_state, second_state, index, grad,
    count, rate, decay, beta1, beta2, eps, factor, key, first_row_id,
    RULE: tl.constexpr, SCALED: tl.constexpr, FLAGGED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One step on a block of rows; see rows.RowStep for the rules and rows.RowKernels.update for the states."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = at < count
    row = tl.load(index + at, mask=here, other=0)
    columns = tl.arange(0, COLUMNS)
    mask = here[:, None] & (columns < WIDTH)[None, :]
    element = row[:, None] * WIDTH + columns[None, :]
    of_row = _row_noise(row + first_row_id, key)
    wide = of_row[:, None]
    column = columns[None, :]
    if FLAGGED:
        tl.store(flags + row, tl.full([ROWS], _FLAG, tl.uint8), mask=here)
    values = tl.load(weight + element, mask=mask, other=0).to(tl.float32)
    if SCALED:
        values = values * tl.load(scale + row, mask=here, other=0.0)[:, None]
    g = tl.load(grad + at[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0) * factor
    values = values * decay
    if RULE == "sgd":
        values = values - rate * g
    elif RULE == "rowwise_adagrad":
        added = tl.div_rn(tl.sum(g * g, axis=1), WIDTH * 1.0)
        sums = tl.load(first_state + row, mask=here, other=0.0).to(tl.float32) + added
        _store_state(first_state, row, sums, _state_noise(of_row, WIDTH), here)
        values = values - g * tl.div_rn(rate, tl.sqrt_rn(sums) + eps)[:, None]
    else:
        mean = beta1 * tl.load(first_state + element, mask=mask, other=0.0).to(tl.float32) + (1.0 - beta1) * g
        _store_state(first_state, element, mean, _column_noise(wide, column + WIDTH), mask)
        if RULE == "adam":
            square = (
                beta2 * tl.load(second_state + element, mask=mask, other=0.0).to(tl.float32) + (1.0 - beta2) * g * g
            )
            _store_state(second_state, element, square, _column_noise(wide, column + 2 * WIDTH), mask)
            values = values - mean * tl.div_rn(rate, tl.sqrt_rn(square) + eps)
        else:
            tl.static_assert(RULE == "rowwise_adam", "a rule that this kernel does not know")
            added = (1.0 - beta2) * (tl.div_rn(tl.sum(g * g, axis=1), WIDTH * 1.0))
            own = beta2 * tl.load(second_state + row, mask=here, other=0.0).to(tl.float32) + added
            _store_state(second_state, row, own, _state_noise(of_row, 2 * WIDTH), here)
            values = values - mean * tl.div_rn(rate, tl.sqrt_rn(own) + eps)[:, None]
    if SCALED:
        largest = tl.max(tl.where(mask, tl.abs(values), 0.0), axis=1) * (1.0 / 127.0)
        inverse = tl.where(largest > 0.0, tl.div_rn(1.0, tl.where(largest > 0.0, largest, 1.0)), 0.0)
        drawn = (_column_noise(wide, column) >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        lifted = tl.floor(values * inverse[:, None] + drawn)
        tl.store(weight + element, tl.minimum(tl.maximum(lifted, -127.0), 127.0).to(tl.int8), mask=mask)
        tl.store(scale + row, largest, mask=here)
    else:
        _store_state(weight, element, values, _column_noise(wide, column), mask)


def _tiles(width: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    return {"WIDTH": width, "ROWS": max(1, _TILE // columns), "COLUMNS": columns}


def add_warps(columns: int) -> int:
    """Number of warps of add_kernel: one for narrow rows. With 512 columns or more per warp, registers would spill."""
    return min(16, max(1, columns // 128))


class TritonRowKernels(RowKernels):
    """The Triton kernels, on CUDA tensors. Distinct ids come from torch's sort, which is the vendor's radix sort."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[HashTables, torch.device], Tensor] = {}

    def ngram_row_ids(self, extended: Tensor, tables: HashTables) -> Tensor:
        extended = extended.contiguous()
        count, longest = len(tables.sizes), max(tables.orders)
        length = extended.shape[-1] - longest + 1
        out = extended.new_empty(*extended.shape[:-1], length, count)
        positions = out.numel() // count
        if positions == 0:
            return out
        smallest = min(tables.sizes)
        key = (tables, extended.device)
        if key not in self._numbers:  # copied once: a copy per step would wait for the device
            rows = [
                (tables.orders[t], size, sum(tables.sizes[:t]) + (count - 1 - t) * smallest)
                for t, size in enumerate(tables.sizes)
            ]
            self._numbers[key] = torch.tensor(rows, device=extended.device)
        grid = (triton.cdiv(positions, 256), count)
        ngram_row_ids_kernel[grid](
            extended, self._numbers[key], out, positions, length, tables.base, tables.pad_id, tables.eod_id,
            tables.stripes, sum(tables.sizes), smallest,
            TABLES=count, LONGEST=longest, RESET=tables.reset, BLOCK=256,
        )  # fmt: skip
        return out

    def read(self, rows: StoredRows, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self.gather(rows, None, index, dtype)

    def gather(
        self,
        rows: StoredRows,
        index: Tensor | None,
        slots: Tensor,
        dtype: torch.dtype,
        sorted_lookups: Tensor | None = None,
    ) -> Tensor:
        assert rows.weight.is_contiguous()
        slots = slots.contiguous()
        out = torch.empty(*slots.shape, rows.weight.shape[1], dtype=dtype, device=rows.weight.device)
        tiles = _tiles(rows.weight.shape[1])
        if slots.numel() > 0:
            gather_kernel[(triton.cdiv(slots.numel(), tiles["ROWS"]),)](
                rows.weight, rows.scale, index, slots, out, slots.numel(),
                INDEXED=index is not None, SCALED=rows.scale is not None, **tiles,
            )  # fmt: skip
        return out

    def add(self, sums: RowGradientSums, sorted_lookups: Tensor, grad: Tensor, *, fresh: bool = False) -> None:
        total = sums.total
        if total.shape[0] == 0:
            return
        assert total.is_contiguous() and total.dtype == torch.float32
        rows = torch.arange(1, total.shape[0] + 1, device=sorted_lookups.device)
        ends = torch.searchsorted(sorted_lookups, rows << 32)
        columns = triton.next_power_of_2(grad.shape[1])
        add_kernel[(total.shape[0],)](
            grad.contiguous(), sorted_lookups, ends, total, sums.row_squared_norms,
            FRESH=fresh, WIDTH=grad.shape[1], COLUMNS=columns, num_warps=add_warps(columns),
        )  # fmt: skip

    def update(self, rows: StoredRows, state: dict[str, Tensor], index: Tensor, grad: Tensor, step: RowStep) -> None:
        if index.numel() == 0:
            return
        assert rows.weight.is_contiguous() and grad.dtype == torch.float32
        first = state.get("square_sum" if step.rule == "rowwise_adagrad" else "exp_avg")
        tiles = _tiles(grad.shape[1])
        key = step.noise - 2**32 if step.noise >= 2**31 else step.noise  # one signature for all keys
        update_kernel[(triton.cdiv(index.numel(), tiles["ROWS"]),)](
            rows.weight, rows.scale, rows.flags, first, state.get("exp_avg_sq"), index.contiguous(), grad.contiguous(),
            index.numel(), step.rate, step.decay, *step.betas, step.eps, step.grad_factor, key, rows.first_row_id,
            RULE=step.rule, SCALED=rows.scale is not None, FLAGGED=rows.flags is not None, **tiles,
        )  # fmt: skip
