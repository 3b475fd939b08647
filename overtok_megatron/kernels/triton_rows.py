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
    HashTables,
    RowGradientSums,
    RowKernels,
    RowStep,
    StoredRows,
)
from overtok_megatron.kernels.triton_hash import hash_ngrams, table_numbers
from overtok_megatron.kernels.triton_sums import add_gradients

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


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["scale", "index", "slots"])
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


@triton.jit(
    do_not_specialize=["count", "key", "first_row_id"],
    do_not_specialize_on_alignment=["scale", "flags", "index"],
)
def update_kernel(
    weight, scale, flags, first_state, second_state, index, grad,
    count, rate: tl.float32, decay: tl.float32, beta1: tl.float32, beta2: tl.float32, eps: tl.float32, factor: tl.float32,
    key, first_row_id,
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
    # every load is under way before the first result is needed: the compiler keeps their order
    values = tl.load(weight + element, mask=mask, other=0).to(tl.float32)
    g = tl.load(grad + at[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
    if RULE == "rowwise_adagrad":
        sums = tl.load(first_state + row, mask=here, other=0.0).to(tl.float32)
    elif RULE != "sgd":
        mean = tl.load(first_state + element, mask=mask, other=0.0).to(tl.float32)
    if RULE == "adam":
        square = tl.load(second_state + element, mask=mask, other=0.0).to(tl.float32)
    elif RULE == "rowwise_adam":
        own = tl.load(second_state + row, mask=here, other=0.0).to(tl.float32)
    if SCALED:
        values = values * tl.load(scale + row, mask=here, other=0.0)[:, None]
    if FLAGGED:
        tl.store(flags + row, tl.full([ROWS], _FLAG, tl.uint8), mask=here)
    g = g * factor
    values = values * decay
    if RULE == "sgd":
        values = values - rate * g
    elif RULE == "rowwise_adagrad":
        sums = sums + tl.div_rn(tl.sum(g * g, axis=1), WIDTH * 1.0)
        _store_state(first_state, row, sums, _state_noise(of_row, WIDTH), here)
        values = values - g * tl.div_rn(rate, tl.sqrt_rn(sums) + eps)[:, None]
    else:
        mean = beta1 * mean + (1.0 - beta1) * g
        _store_state(first_state, element, mean, _column_noise(wide, column + WIDTH), mask)
        if RULE == "adam":
            square = beta2 * square + (1.0 - beta2) * g * g
            _store_state(second_state, element, square, _column_noise(wide, column + 2 * WIDTH), mask)
            values = values - mean * tl.div_rn(rate, tl.sqrt_rn(square) + eps)
        else:
            tl.static_assert(RULE == "rowwise_adam", "a rule that this kernel does not know")
            added = (1.0 - beta2) * (tl.div_rn(tl.sum(g * g, axis=1), WIDTH * 1.0))
            own = beta2 * own + added
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


def _tiles(width: int, values: int) -> dict[str, int]:
    """Compile-time sizes of a program that holds about so many values.

    Columns fill a power of two: for a width of 48, a quarter of the lanes is idle; for 100, 22%.
    """
    columns = triton.next_power_of_2(width)
    return {"WIDTH": width, "ROWS": max(1, values // columns), "COLUMNS": columns}


def gather_tiles(width: int) -> dict[str, int]:
    """16 values per thread: two loads of 16 bytes of bfloat16."""
    return _tiles(width, 2048)


def update_tiles(width: int) -> dict[str, int]:
    """8 values per thread, so that about 40 registers suffice and 48 warps run on a multiprocessor."""
    return _tiles(width, 1024)


def _aligned(values: Tensor) -> Tensor:
    """The same values, contiguous and at an address that is a multiple of 16 bytes.

    Triton compiles a kernel for each alignment, and a part of a larger tensor may begin anywhere. Whole tensors are aligned.
    """
    values = values.contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()


class TritonRowKernels(RowKernels):
    """The Triton kernels, on CUDA tensors. Distinct ids come from torch's sort, which is the vendor's radix sort."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[HashTables, torch.device], Tensor] = {}

    def ngram_row_ids(self, extended: Tensor, tables: HashTables) -> Tensor:
        key = (tables, extended.device)
        if key not in self._numbers:  # copied once: a copy per step would wait for the device
            self._numbers[key] = torch.tensor(table_numbers(tables), device=extended.device)
        return hash_ngrams(extended.contiguous(), tables, self._numbers[key])

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
        tiles = gather_tiles(rows.weight.shape[1])
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
        add_gradients(sums, sorted_lookups, _aligned(grad), fresh=fresh)

    def update(self, rows: StoredRows, state: dict[str, Tensor], index: Tensor, grad: Tensor, step: RowStep) -> None:
        if index.numel() == 0:
            return
        assert rows.weight.is_contiguous() and grad.dtype == torch.float32
        first = state.get("square_sum" if step.rule == "rowwise_adagrad" else "exp_avg")
        tiles = update_tiles(grad.shape[1])
        key = step.noise - 2**32 if step.noise >= 2**31 else step.noise  # one signature for all keys
        update_kernel[(triton.cdiv(index.numel(), tiles["ROWS"]),)](
            rows.weight, rows.scale, rows.flags, first, state.get("exp_avg_sq"), index.contiguous(), _aligned(grad),
            index.numel(), step.rate, step.decay, *step.betas, step.eps, step.grad_factor, key, rows.first_row_id,
            RULE=step.rule, SCALED=rows.scale is not None, FLAGGED=rows.flags is not None, **tiles,
        )  # fmt: skip
