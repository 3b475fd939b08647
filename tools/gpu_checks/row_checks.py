"""What every compiled form of the row kernels must do, against torch's operators; `gpu_check.py` and the tests run it.

`python tools/gpu_checks/row_checks.py NAME..` runs them on Triton's interpreter, where TRITON_INTERPRET=1 is set.
"""

import os
import sys
from dataclasses import dataclass
from itertools import product
from typing import get_args

import torch
from torch import Tensor

from overtok_megatron.config.counts import ROW_STATES
from overtok_megatron.config.schema import RowRule
from overtok_megatron.kernels.rows import (
    CHANGED,
    HashTables,
    RowGradientSums,
    RowKernels,
    RowStep,
    StoredRows,
    noise_key,
    round_int8,
)

PLAIN = RowKernels()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMATS = (torch.float32, torch.bfloat16, torch.int8)


def stored(values: Tensor, dtype: torch.dtype) -> StoredRows:
    """Rows far into a row space of more than 2^32."""
    flags = torch.zeros(values.shape[0], dtype=torch.uint8, device=values.device)
    if dtype == torch.int8:
        return StoredRows(*round_int8(values, torch.full_like(values, 2**31, dtype=torch.int64)), 2**33 + 5, flags)
    return StoredRows(values.to(dtype), None, 2**33 + 5, flags)


def copy_of(rows: StoredRows) -> StoredRows:
    scale, flags = (None if column is None else column.clone() for column in (rows.scale, rows.flags))
    return StoredRows(rows.weight.clone(), scale, rows.first_row_id, flags)


def check_ngram_row_ids(kernels: RowKernels, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(-1, 30, (3, 4, 41), generator=generator) * 3371  # up to V = 10^5, with missing ones
    # the second sizes differ as much as those of added tables may
    sizes = ((2**31 - 9, 70_001, 70_003, 2**31 - 1), (10**6, 7, 10**6 + 2, 9))
    for reset, own in product((False, True), sizes):
        tables = HashTables(
            orders=(2, 2, 3, 4), sizes=own, base=100_278, pad_id=7, reset=reset, eod_id=2 * 3371, stripes=4099
        )
        extended = tokens.to(device)
        assert torch.equal(kernels.ngram_row_ids(extended, tables), PLAIN.ngram_row_ids(extended, tables))


def check_look_ups(kernels: RowKernels, device: torch.device) -> None:
    for width in (1, 7, 24, 64):
        generator = torch.Generator().manual_seed(width)
        index = torch.randperm(500, generator=generator)[:123].to(device)
        slots = torch.randint(0, 123, (5, 40), generator=generator).to(device)
        values = torch.randn(500, width, generator=generator).to(device)
        for dtype in FORMATS:
            rows = stored(values, dtype)
            for wanted in (torch.float32, torch.bfloat16):
                # Triton's interpreter cuts float32 to bfloat16 where the GPU rounds to nearest
                cut = INTERPRETED and wanted == torch.bfloat16 and dtype != wanted
                rtol = 2.0**-7 if cut else 0.0
                torch.testing.assert_close(
                    kernels.read(rows, index, wanted), PLAIN.read(rows, index, wanted), rtol=rtol, atol=0.0
                )
                for where in (index, None):
                    expected = PLAIN.gather(rows, where, slots, wanted)
                    for sorted_lookups in (None, kernels.sort_lookups(slots, 123)):
                        ours = kernels.gather(rows, where, slots, wanted, sorted_lookups)
                        torch.testing.assert_close(ours, expected, rtol=rtol, atol=0.0)
                assert kernels.gather(rows, None, slots[:0], wanted).shape == (0, 40, width)


def check_sums(kernels: RowKernels, device: torch.device) -> None:
    """Sums of gradients where one row is hot and some are unused: right, the same bits again, and with the right squares."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(2, 300, (3000,), generator=generator)
    slots[:700] = 5
    sorted_lookups = kernels.sort_lookups(slots.to(device), 310)
    assert torch.equal(sorted_lookups.cpu(), PLAIN.sort_lookups(slots, 310))
    for width in (1, 7, 64):
        for dtype in (torch.float32, torch.bfloat16):
            grad = torch.randn(3000, width, generator=generator).to(dtype)
            expected = torch.zeros(310, width, dtype=torch.float64).index_add_(0, slots, grad.double())
            for fresh in (False, True):
                totals = []
                for filling in (1.0, float("nan") if fresh else 1.0):
                    total = torch.full((310, width), filling, device=device)
                    sums = RowGradientSums(total, total.sum(1))  # a row of ones has its width as square
                    kernels.add(sums, sorted_lookups, grad.to(device), fresh=fresh)
                    totals.append(total.cpu())
                    squares = total.double().square().sum(1).float()
                    torch.testing.assert_close(sums.row_squared_norms, squares, rtol=1e-5, atol=0.0)
                assert torch.equal(*totals)
                torch.testing.assert_close(totals[0].double(), expected + (not fresh), rtol=1e-5, atol=1e-4)
            nothing = RowGradientSums(torch.ones(310, width, device=device), torch.ones(310, device=device))
            kernels.add(nothing, sorted_lookups[:0], grad[:0].to(device), fresh=True)
            assert not nothing.total.any()
            assert not nothing.row_squared_norms.any()
    for size in (0, 1, 4097, 20_003):
        values = torch.rand(size, generator=generator) * 1e3
        total = kernels.sum(values.to(device))
        assert total.dtype == torch.float64
        expected = values.double().sum()
        torch.testing.assert_close(total.cpu(), expected, rtol=1e-12, atol=0.0)


# Rows with more look-ups than SHORT are summed in several parts by some kernels (triton_sums.SEGMENT).
SHORT = 64
_COUNTS = (
    0,
    1,
    15,
    16,
    17,
    SHORT - 1,
    SHORT,
    SHORT + 1,
    2 * SHORT,
    2 * SHORT + 1,
    0,
    3,
    10 * SHORT,
    2,
    2,
    1,
    0,
    SHORT + 1,
)
FREQUENT_WIDTHS = (1, 8, 48, 64, 100, 256, 512, 1000)


@dataclass(frozen=True)
class FrequentRows:
    """Gradients [N, w] of look-ups with slots [N]: row r has counts[r] of them, and the last row 30% of all."""

    counts: Tensor
    slots: Tensor
    grad: Tensor

    @classmethod
    def make(cls, width: int, dtype: torch.dtype) -> "FrequentRows":
        generator = torch.Generator().manual_seed(width)
        counts = torch.tensor([*_COUNTS, sum(_COUNTS) * 3 // 7])
        slots = torch.arange(len(counts)).repeat_interleave(counts)
        slots = slots[torch.randperm(len(slots), generator=generator)]
        return cls(counts, slots, torch.randn(len(slots), width, generator=generator).to(dtype))

    def among_others(self) -> "tuple[FrequentRows, Tensor]":
        """The same look-ups in the same order, with those of other rows between them; and the new numbers of the rows."""
        generator = torch.Generator().manual_seed(1)
        rows, lookups, others = len(self.counts), len(self.slots), 301
        numbers = torch.randperm(2 * rows, generator=generator)
        among = torch.randperm(lookups + others, generator=generator)[:lookups].sort().values
        slots = numbers[torch.randint(rows, 2 * rows, (lookups + others,), generator=generator)]
        slots[among] = numbers[self.slots]
        grad = torch.randn(lookups + others, self.grad.shape[1], generator=generator).to(self.grad.dtype)
        grad[among] = self.grad
        return FrequentRows(slots.bincount(minlength=2 * rows), slots, grad), numbers[:rows]

    def add(self, kernels: RowKernels, device: torch.device, sums: RowGradientSums | None = None) -> RowGradientSums:
        """The sums on the CPU. sums: what there is before."""
        fresh, rows, width = sums is None, len(self.counts), self.grad.shape[1]
        if sums is None:
            sums = RowGradientSums(torch.full((rows, width), torch.nan), torch.full((rows,), torch.nan))
        sums = RowGradientSums(*(part.clone().to(device) for part in sums))
        kernels.add(sums, kernels.sort_lookups(self.slots.to(device), rows), self.grad.to(device), fresh=fresh)
        return RowGradientSums(*(part.cpu() for part in sums))


def check_frequent_rows(kernels: RowKernels, device: torch.device) -> None:
    """Sums of rows with very different numbers of look-ups, for every width and both dtypes of gradients."""
    for width, dtype in product(FREQUENT_WIDTHS, (torch.float32, torch.bfloat16)):
        frequent_rows_are_right(kernels, device, width, dtype)


def check_few_frequent_rows(kernels: RowKernels, device: torch.device) -> None:
    """The short form of check_frequent_rows, for Triton's interpreter."""
    frequent_rows_are_right(kernels, device, 8, torch.float32)
    frequent_rows_are_right(kernels, device, 48, torch.bfloat16)


def frequent_rows_are_right(kernels: RowKernels, device: torch.device, width: int, dtype: torch.dtype) -> None:
    """Sums equal torch's to 1e-6 of the sum of sizes, and have the same bits whatever other rows there are."""
    rows = FrequentRows.make(width, dtype)
    sums = rows.add(kernels, device)
    exact = torch.zeros(sums.total.shape, dtype=torch.float64).index_add_(0, rows.slots, rows.grad.double())
    sizes = torch.zeros_like(exact).index_add_(0, rows.slots, rows.grad.double().abs())
    for expected in (exact, rows.add(PLAIN, torch.device("cpu")).total):
        assert ((sums.total - expected).abs() <= 1e-6 * sizes).all()
    for row in (
        (rows.counts <= SHORT).nonzero().flatten().tolist()
    ):  # these are added one after the other, as on the CPU
        values = rows.grad[rows.slots == row].float().numpy()
        expected = torch.from_numpy(values.cumsum(axis=0)[-1]) if len(values) else torch.zeros(width)
        assert torch.equal(sums.total[row], expected), f"row {row}"
    torch.testing.assert_close(sums.row_squared_norms, sums.total.square().sum(1), rtol=1e-5, atol=0.0)

    others, numbers = rows.among_others()
    assert torch.equal(others.add(kernels, device).total[numbers], sums.total)

    more = rows.add(kernels, device, sums)
    assert ((more.total - 2 * exact).abs() <= 2e-6 * sizes).all()
    torch.testing.assert_close(more.row_squared_norms, more.total.square().sum(1), rtol=1e-5, atol=0.0)


def row_step(rule: RowRule) -> RowStep:
    """A step in which every number matters."""
    return RowStep(rule=rule, rate=0.1, decay=0.97, betas=(0.8, 0.9), eps=1e-8, grad_factor=0.5, noise=noise_key(3, 17))


@dataclass(frozen=True)
class Update:
    """One update of some of 500 rows: what there was before, what torch's operators make of it, and what the kernels make."""

    index: Tensor  # [123], the rows with a gradient
    start: StoredRows
    start_state: dict[str, Tensor]
    expected: StoredRows
    expected_state: dict[str, Tensor]
    rows: StoredRows
    state: dict[str, Tensor]

    def others(self) -> Tensor:
        """[500] bool: rows without a gradient."""
        return torch.ones(500, dtype=torch.bool, device=self.index.device).index_fill(0, self.index, False)


def make_update(
    kernels: RowKernels, device: torch.device, rule: RowRule, state_dtype: torch.dtype, dtype: torch.dtype, width: int
) -> Update:
    generator = torch.Generator().manual_seed(1)
    index = torch.randperm(500, generator=generator)[:123].to(device)
    start = stored(torch.randn(500, width, generator=generator).to(device), dtype)
    states = {
        name: torch.rand((500, width) if wide else (500,), generator=generator).to(device, state_dtype)
        for name, wide in ROW_STATES[rule].items()
    }
    grad = torch.randn(123, width, generator=generator).to(device)
    results = []
    for each in (PLAIN, kernels):
        rows, state = copy_of(start), {name: values.clone() for name, values in states.items()}
        each.update(rows, state, index, grad, row_step(rule))
        results.append((rows, state))
    (expected, expected_state), (rows, state) = results
    return Update(index, start, states, expected, expected_state, rows, state)


def updated_weights_are_torchs(update: Update) -> None:
    """The last bit of the arithmetic may differ, and then, rarely, the way that a value is rounded."""
    weight, expected = update.rows.weight, update.expected.weight
    if weight.dtype == torch.float32:
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    else:
        away = (weight.double() - expected.double()).abs()
        assert (away > 0).double().mean() < 0.01
        assert away.max() <= (1 if weight.dtype == torch.int8 else 2**-6)


def updated_scales_are_torchs(update: Update) -> None:
    assert (update.rows.scale is None) == (update.start.scale is None)
    if update.rows.scale is not None and update.expected.scale is not None:
        torch.testing.assert_close(update.rows.scale, update.expected.scale, rtol=1e-5, atol=0)


def updated_state_is_torchs(update: Update) -> None:
    for name, values in update.state.items():
        expected = update.expected_state[name]
        torch.testing.assert_close(values.float(), expected.float(), rtol=2**-7, atol=1e-7)
        assert (values != expected).double().mean() < (1 if values.dtype == torch.float32 else 0.01), name
        assert not torch.equal(values, update.start_state[name]), name


def updated_rows_alone_are_flagged(update: Update) -> None:
    assert update.rows.flags is not None
    assert torch.equal(update.rows.flags.nonzero().squeeze(1), update.index.sort().values)
    assert update.rows.flags.max() == CHANGED


def other_rows_keep_their_bits(update: Update) -> None:
    others = update.others()
    assert torch.equal(update.rows.weight[others], update.start.weight[others])
    for name, values in update.state.items():
        assert torch.equal(values[others], update.start_state[name][others]), name


PROPERTIES_OF_UPDATES = (
    updated_weights_are_torchs,
    updated_scales_are_torchs,
    updated_state_is_torchs,
    updated_rows_alone_are_flagged,
    other_rows_keep_their_bits,
)


def check_updates(kernels: RowKernels, device: torch.device) -> None:
    """Every property of an update of every rule, by every dtype of rows and of state."""
    for rule, state_dtype, dtype, width in product(
        get_args(RowRule), (torch.float32, torch.bfloat16), FORMATS, (1, 24)
    ):
        update = make_update(kernels, device, rule, state_dtype, dtype, width)
        for holds in PROPERTIES_OF_UPDATES:
            holds(update)


def check_rounding(kernels: RowKernels, device: torch.device) -> None:
    """Multiples of 2^-10 and a power of two as rate: the arithmetic is exact, so only the rounding is in play."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(-4000, 4000, (60, 33), generator=generator) * 2.0**-10
    grad = (torch.randint(-4000, 4000, (60, 33), generator=generator) * 2.0**-10).to(device)
    start = stored(values.to(device), torch.bfloat16)
    exact = start.weight.double() - 2.0**-6 * grad.double()
    for key in (noise_key(5, 9), 1, 2**32 - 1):
        step = RowStep(rule="sgd", rate=2.0**-6, decay=1.0, betas=(0.0, 0.0), eps=0.0, grad_factor=1.0, noise=key)
        rows, plain = copy_of(start), copy_of(start)
        kernels.update(rows, {}, torch.arange(60, device=device), grad, step)
        PLAIN.update(plain, {}, torch.arange(60, device=device), grad, step)
        assert torch.equal(rows.weight, plain.weight)
        error = (rows.weight.double() - exact).abs()
        assert (error < 2.0**-7 * exact.abs() + 1e-30).all()  # rounded to one of the two neighbours
        assert (error > 0).any()


CHECKS = [check_ngram_row_ids, check_look_ups, check_sums, check_frequent_rows, check_updates, check_rounding]


if __name__ == "__main__":
    from overtok_megatron.kernels.triton_rows import TritonRowKernels

    for name in sys.argv[1:]:
        globals()[name](TritonRowKernels(), torch.device("cpu"))
        print(name)
