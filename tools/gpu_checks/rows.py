"""The row kernels: what they must do, at sizes where 32 bits do not suffice, and how near they come to a copy's speed.

Shapes: m rows of a table, w their width, N look-ups, U distinct rows of them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

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
    """Speed of look-ups, sums and updates at three widths, as shares of a copy's bytes/s; the aim is 70%."""
    limit = copy_rate(context)
    numbers: dict[str, float] = {"copy": limit}
    words = []
    for width in (64, 256, 512):
        rates = _rates(context, width)
        numbers |= {f"{name}, w {width}": rate for name, rate in rates.items()}
        words.append(f"w {width}: " + " ".join(f"{rate / limit:.0%}" for rate in rates.values()))
    return Result(
        None, "look-ups, sums, update: " + "; ".join(words), f"70% of a copy, {limit / 1e9:.0f} GB/s", numbers
    )


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
    ratios, numbers, worst = [], {}, 0.0
    for width in (64, 512):
        grad = torch.randn(count, width, device=device, dtype=torch.bfloat16)
        times = []
        for name, slots in (("even", even.to(device)), ("hot", hot.to(device))):
            sorted_lookups = kernels.sort_lookups(slots, unique)
            sums = RowGradientSums.empty(unique, width, device)
            times.append(seconds_of(partial(kernels.add, sums, sorted_lookups, grad, fresh=True), device))
            numbers[f"{name}, w {width}"] = times[-1]
            worst = max(worst, _error_of_sums(sums.total, slots, grad))
        ratios.append(f"{times[1] / times[0]:.1f} x ({1e3 * times[1]:.2f} ms) at w {width}")
    return Result(
        worst < 1e-6,
        f"the time of even look-ups {', '.join(ratios)}; error {worst:.0e}",
        "error 1e-06 of the summed sizes",
        {"seconds": numbers, "error": worst},
    )


def _error_of_sums(total: Tensor, slots: Tensor, grad: Tensor) -> float:
    """Largest error of sums [U, w] of gradients [N, w], relative to the sum of their sizes where that is above 1."""
    worst = 0.0
    for columns in range(0, grad.shape[1], _WIDTH):  # in parts: float64 takes memory
        part = grad[:, columns : columns + _WIDTH].double()
        exact = torch.zeros(total.shape[0], part.shape[1], dtype=torch.float64, device=total.device)
        size = exact.clone().index_add_(0, slots, part.abs())
        exact.index_add_(0, slots, part)
        away = (total[:, columns : columns + _WIDTH] - exact).abs() / size.clamp(min=1.0)
        worst = max(worst, float(away.max()))
    return worst


def recompilations(context: Context) -> Result:
    """Steps with other counts, rates and addresses: Triton compiles nothing after the first of them."""
    device, kernels = context.device, choose_kernels("auto", context.device).rows
    rows = 4096
    table = StoredRows(torch.zeros(rows, _WIDTH, dtype=torch.bfloat16, device=device), None, 0, None)
    state, numbers = {"square_sum": torch.zeros(rows, device=device)}, torch.arange(rows, device=device)
    grads = torch.ones(rows, _WIDTH, device=device)
    first, counts = 0, (257, 0, 1, 15, 16, 17, 1024, 1025, 2048)
    for step, count in enumerate(counts):
        index = numbers[step : step + count]
        gathered = kernels.gather(table, None, index, torch.bfloat16)
        sums = RowGradientSums.empty(count, _WIDTH, device)
        for fresh in (True, False):
            kernels.add(sums, kernels.sort_lookups(numbers[:count], count), gathered, fresh=fresh)
        kernels.update(
            table, state, index, grads[step : step + count], replace(_STEP, rate=step % 2, noise=step * 2**29)
        )
        first = first or _compiled()
    more = _compiled() - first
    assert torch.equal(state["square_sum"] > 0, numbers < len(counts) - 1 + counts[-1]), "a row has not been updated"
    return Result(
        more == 0,
        f"{more} kernels compiled after the first of {len(counts)} steps",
        "0",
        {"compiled": more},
    )


def _compiled() -> int:
    """How many kernels Triton has compiled in this process for the row kernels."""
    try:
        from overtok_megatron.kernels import triton_rows, triton_sums
    except ImportError:  # without Triton nothing is compiled
        return 0
    functions: tuple[Any, ...] = (
        triton_rows.gather_kernel,
        triton_rows.update_kernel,
        triton_sums.add_kernel,
        triton_sums.add_segments_kernel,
    )
    return sum(len(caches[0]) for function in functions for caches in function.device_caches.values())
