"""The compiled loops over rows against torch's operators: equal where no rounding is in play, on any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtok_megatron.kernels.build import load_library
from overtok_megatron.kernels.rows import CpuRowKernels, RowKernels

LIBRARY = load_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler")
PLAIN = RowKernels()


def compiled() -> CpuRowKernels:
    assert LIBRARY is not None
    return CpuRowKernels(LIBRARY)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 2**40 - 1), max_size=60), st.integers(1, 3))
def test_unique_ids_and_their_places(ids: list[int], repeats: int) -> None:
    tensor = torch.tensor(ids * repeats, dtype=torch.int64).view(repeats, -1)
    unique, slots = compiled().unique(tensor, 2**40)
    expected, places = PLAIN.unique(tensor, 2**40)
    assert torch.equal(unique, expected)
    assert torch.equal(slots, places)
    assert slots.shape == tensor.shape


@pytest.mark.parametrize("limit", [1, 2, 2047, 2048, 2049, 10**6])
def test_many_ids_on_several_threads(limit: int) -> None:
    ids = torch.randint(0, limit, (3, 20_011), generator=torch.Generator().manual_seed(limit))
    ids[0, 0] = limit - 1
    unique, slots = compiled().unique(ids, limit)
    assert torch.equal(unique[slots], ids)
    assert torch.equal(unique, ids.unique())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_rows_are_added_in_the_order_of_look_ups(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(0, 300, (9000,), generator=generator)
    slots[:2000] = 5  # a hot row
    grad = torch.randn(9000, width, generator=generator).to(dtype)
    totals = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        total = torch.ones(300, width)
        compiled().add(total, slots, grad)
        totals.append(total)
    torch.set_num_threads(before)
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])
    expected = torch.ones(300, width, dtype=torch.float64).index_add_(0, slots, grad.double())
    torch.testing.assert_close(totals[0].double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [1.0, 0.97])
def test_adagrad_moves_the_named_rows_alone(state: torch.dtype, decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(500, generator=generator)[:123]
    start, sums = torch.randn(500, 24, generator=generator), torch.rand(500, generator=generator).to(state)
    results = []
    for kernels in (PLAIN, compiled()):
        weight, square_sum = start.clone(), sums.clone()
        for turn in range(3):
            grad = torch.randn(123, 24, generator=torch.Generator().manual_seed(turn))
            kernels.adagrad(weight, square_sum, rows, grad, 0.1, 1e-8, decay)
        results.append((weight, square_sum))
    (expected, expected_sums), (weight, square_sum) = results
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(square_sum, expected_sums, rtol=1e-5, atol=0)
    others = torch.ones(500, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(weight[others], start[others])
    assert torch.equal(square_sum[others], sums[others])


@pytest.mark.parametrize("size", [0, 1, 16383, 16385, 100_003])
def test_the_sum_of_squares(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1e3
    total = compiled().square_sum(values)
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(PLAIN.square_sum(values).item(), rel=1e-12)
