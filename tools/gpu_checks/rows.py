"""The row kernels: what they must do, at sizes where 32 bits do not suffice, and how near they come to a copy's speed.

Shapes: m rows of a table, w their width, N look-ups, U distinct rows of them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu_checks import row_checks
from gpu_checks.registry import Context, Result
from gpu_checks.timing import copy_rate, free_memory, seconds_of
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.rows import RowGradientSums, RowKernels, StoredRows

_WIDTH = 64
_MANY = 48 * 2**20  # rows of 64 are past 2^31 elements
_STEP = row_checks.row_step("rowwise_adagrad")


def oracle(check: Callable[[RowKernels, torch.device], None]) -> Callable[[Context], Result]:
    """A check of row_checks.py with the kernels that belong to the device."""
    return _Oracle(check.__name__)


class _Oracle:
    """By name, so that it travels to another process."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, context: Context) -> Result:
        kernels = choose_kernels("auto", context.device).rows
        getattr(row_checks, self.name)(kernels, context.device)
        return Result(True, f"{type(kernels).__name__} equals torch's form", "bits where nothing is rounded, else 1e-5")


def _made_table(context: Context, rows: int) -> StoredRows:
    """bfloat16 rows [m, 64] of random values, with flags."""
    weight = torch.empty(rows, _WIDTH, dtype=torch.bfloat16, device=context.device)
    torch.manual_seed(0)
    for part in weight.split(2**22):
        part.normal_()
    return StoredRows(weight, None, 2**33 + 5, torch.zeros(rows, dtype=torch.uint8, device=context.device))


def _table_rows(context: Context) -> int:
    """m: 48 M, or what lets two tables with their states lie in 80% of the device's free memory."""
    if not context.cuda:
        return 50_001
    return min(_MANY, int(free_memory(context) * 0.8) // (2 * (2 * _WIDTH + 4 + 1)))


def large_table(context: Context) -> Result:
    """Look-ups and an update at the start, the end and both sides of element 2^31 of a large table, against torch's form."""
    rows, device = _table_rows(context), context.device
    table = _made_table(context, rows)
    edges = [0, 2**31 // _WIDTH, 2**32 // _WIDTH, rows]
    near = torch.cat([torch.arange(edge - 1000, edge + 1000) for edge in edges])
    near = near[(near >= 0) & (near < rows)]
    generator = torch.Generator().manual_seed(1)
    index = torch.cat([near, torch.randint(0, rows, (100_000 if context.cuda else 3000,), generator=generator)])
    index = index.unique().to(device)
    kernels, plain = choose_kernels("auto", device).rows, RowKernels()
    for sorted_lookups in (None, kernels.sort_lookups(index, rows)):  # the table's own rows as slots
        gathered = kernels.gather(table, None, index, torch.bfloat16, sorted_lookups)
        assert torch.equal(gathered, plain.gather(table, None, index, torch.bfloat16)), (
            "a row that was looked up is wrong"
        )
    copy = StoredRows(
        table.weight.clone(), None, table.first_row_id, None if table.flags is None else table.flags.clone()
    )
    grad = torch.randn(index.numel(), _WIDTH, generator=generator).to(device)
    sums = [torch.ones(rows, device=device) for _ in range(2)]
    for own, each, state in ((table, kernels, sums[0]), (copy, plain, sums[1])):
        each.update(own, {"square_sum": state}, index, grad, _STEP)
    torch.testing.assert_close(*sums, rtol=1e-5, atol=0.0)
    differing = _compare_updated(table, copy, index)
    elements = table.weight.numel()
    assert table.flags is not None and copy.flags is not None and torch.equal(table.flags, copy.flags), "flags differ"
    return Result(
        differing <= 0.01,
        f"{rows / 2**20:.1f} M rows of 64 ({elements / 2**31:.2f} x 2^31 elements), {differing:.2%} of values rounded apart",
        "1% rounded apart; 1.5 x 2^31" if context.cuda else "1% rounded apart",
        {"rows": rows, "elements": elements, "rounded_apart": differing},
    )


def _compare_updated(table: StoredRows, expected: StoredRows, index: Tensor) -> float:
    """Share of the updated values that differ, each by one rounding at most; all other rows must have the same bits."""
    apart = torch.zeros((), dtype=torch.int64, device=index.device)
    for begin in range(0, table.weight.shape[0], 2**22):
        ours, theirs = (rows.weight[begin : begin + 2**22] for rows in (table, expected))
        updated = torch.zeros(ours.shape[0], dtype=torch.bool, device=index.device)
        updated[index[(index >= begin) & (index < begin + ours.shape[0])] - begin] = True
        different = ours != theirs
        assert not different[~updated].any(), "a row that took no update has changed"
        torch.testing.assert_close(ours[updated], theirs[updated], rtol=2**-6, atol=1e-6)
        apart += different.sum()
    return int(apart) / (index.numel() * table.weight.shape[1])


def row_speed(context: Context) -> Result:
    """GB/s of look-ups, sums and updates at three widths, beside a copy."""
    limit = copy_rate(context)
    numbers: dict[str, float] = {"copy": limit}
    words = []
    for width in (64, 256, 512):
        rates = _rates(context, width)
        numbers |= {f"{name}, w {width}": rate for name, rate in rates.items()}
        words.append(f"w {width}: " + " ".join(f"{rate / 1e9:.0f}" for rate in rates.values()))
    return Result(None, "look-ups, sums, update GB/s: " + "; ".join(words), f"{limit / 1e9:.0f} (copy)", numbers)


def _rates(context: Context, width: int) -> dict[str, float]:
    """Bytes/s of each kernel, by the bytes that it cannot avoid; rows of 2 bytes per value, uniform look-ups."""
    device, kernels = context.device, choose_kernels("auto", context.device).rows
    rows, count = 4096, 2048
    if context.cuda:
        rows, count = min(2**31, free_memory(context) // 16) // width, 2**28 // width
    table = StoredRows(torch.zeros(rows, width, dtype=torch.bfloat16, device=device), None, 0, None)
    ids = torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(width)).to(device)
    found = kernels.unique(ids, rows)
    unique = found.ids.numel()
    grad = torch.randn(count, width, device=device, dtype=torch.bfloat16)
    sums, state = RowGradientSums.empty(unique, width, device), {"square_sum": torch.zeros(rows, device=device)}
    kernels.add(sums, found.sorted_lookups, grad, fresh=True)
    work: dict[str, tuple[Callable[[], object], float]] = {
        "look-ups": (
            partial(kernels.gather, table, found.ids, found.slots, torch.bfloat16, found.sorted_lookups),
            width * (2 * unique + 2 * count) + 8 * count,
        ),
        "sums": (
            partial(kernels.add, sums, found.sorted_lookups, grad, fresh=True),
            width * (2 * count + 4 * unique) + 8 * count,
        ),
        "update": (
            partial(kernels.update, table, state, found.ids, sums.total, _STEP),
            width * (2 + 2 + 4) * unique,
        ),
    }
    return {name: size / seconds_of(call, device) for name, (call, size) in work.items()}


def hot_row(context: Context) -> Result:
    """Sums where one row has 30% of the look-ups: right, and how much longer they take than where none is hot."""
    device, kernels = context.device, choose_kernels("auto", context.device).rows
    count, unique = (2**20, 2**18) if context.cuda else (2**12, 2**10)
    generator = torch.Generator().manual_seed(0)
    even = torch.randint(0, unique, (count,), generator=generator)
    hot = even.clone()
    hot[torch.rand(count, generator=generator) < 0.3] = 7
    grad = torch.randn(count, _WIDTH, generator=generator).to(device, torch.bfloat16)
    times, worst = {}, 0.0
    for name, slots in (("even", even), ("hot", hot)):
        sorted_lookups = kernels.sort_lookups(slots.to(device), unique)
        sums = RowGradientSums.empty(unique, _WIDTH, device)
        times[name] = seconds_of(partial(kernels.add, sums, sorted_lookups, grad, fresh=True), device)
        exact = torch.zeros(unique, _WIDTH, dtype=torch.float64, device=device)
        exact.index_add_(0, slots.to(device), grad.double())
        size = torch.zeros_like(exact).index_add_(0, slots.to(device), grad.double().abs())
        worst = max(worst, float(((sums.total.double() - exact).abs() / size.clamp(min=1.0)).max()))
    return Result(
        worst < 1e-5,
        f"{times['hot'] / times['even']:.1f} x the time of even look-ups ({1e3 * times['hot']:.2f} ms); error {worst:.0e}",
        "error 1e-05 of the summed sizes",
        {"seconds": times, "error": worst},
    )
