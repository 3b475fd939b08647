"""Row ids of n-grams on CUDA through Triton: RowKernels.ngram_row_ids, one program per block of positions of one table."""

import triton
import triton.language as tl
from torch import Tensor

from overtok_megatron.kernels.rows import SCATTER, HashTables

_SCATTER = tl.constexpr(SCATTER)
_BLOCK = 256


@triton.jit(do_not_specialize=["positions", "length"], do_not_specialize_on_alignment=["extended", "numbers", "out"])
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


def table_numbers(tables: HashTables) -> list[tuple[int, int, int]]:
    """The argument `numbers` of the kernel."""
    count, smallest = len(tables.sizes), min(tables.sizes)
    return [
        (tables.orders[t], size, sum(tables.sizes[:t]) + (count - 1 - t) * smallest)
        for t, size in enumerate(tables.sizes)
    ]


def hash_ngrams(extended: Tensor, tables: HashTables, numbers: Tensor) -> Tensor:
    """Row ids [.., s, T] int64 of extended [.., n-1+s] int64. numbers: `table_numbers` on the device."""
    count, longest = len(tables.sizes), max(tables.orders)
    length = extended.shape[-1] - longest + 1
    out = extended.new_empty(*extended.shape[:-1], length, count)
    positions = out.numel() // count
    if positions > 0:
        ngram_row_ids_kernel[(triton.cdiv(positions, _BLOCK), count)](
            extended, numbers, out, positions, length, tables.base, tables.pad_id, tables.eod_id,
            tables.stripes, sum(tables.sizes), min(tables.sizes),
            TABLES=count, LONGEST=longest, RESET=tables.reset, BLOCK=_BLOCK,
        )  # fmt: skip
    return out
