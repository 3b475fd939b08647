"""The compiled loops over rows against torch's operators: equal where no rounding is in play, on any number of threads."""

from collections.abc import Callable

import pytest
import torch
from gpu_checks.row_checks import CHECKS, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from overtok_megatron.kernels.build import load_library
from overtok_megatron.kernels.cpu_rows import CpuRowKernels
from overtok_megatron.kernels.rows import RowGradientSums, RowKernels, noise, noise_key, round_bfloat16, round_int8

LIBRARY = load_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no C++ compiler")
PLAIN = RowKernels()


def compiled() -> CpuRowKernels:
    assert LIBRARY is not None
    return CpuRowKernels(LIBRARY)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 2**40 - 1), max_size=60), st.integers(1, 3))
def test_unique_ids_and_their_slots(ids: list[int], repeats: int) -> None:
    tensor = torch.tensor(ids * repeats, dtype=torch.int64).view(repeats, -1)
    for kernels in (compiled(), PLAIN):
        unique, slots, sorted_lookups = kernels.unique(tensor, 2**40)
        expected, inverse = torch.unique(tensor, return_inverse=True)
        assert torch.equal(unique, expected)
        assert torch.equal(slots, inverse)
        assert slots.shape == tensor.shape
        assert torch.equal(sorted_lookups, kernels.sort_lookups(slots, unique.numel()))
        pairs = [slot << 32 | lookup for lookup, slot in enumerate(inverse.flatten().tolist())]
        assert sorted_lookups.tolist() == sorted(pairs)


@pytest.mark.parametrize("limit", [1, 2, 2047, 2048, 2049, 10**6])
def test_many_ids_on_several_threads(limit: int) -> None:
    ids = torch.randint(0, limit, (3, 20_011), generator=torch.Generator().manual_seed(limit))
    ids[0, 0] = limit - 1
    unique, slots, sorted_lookups = compiled().unique(ids, limit)
    assert torch.equal(unique[slots], ids)
    assert torch.equal(unique, ids.unique())
    assert torch.equal(sorted_lookups, PLAIN.unique(ids, limit).sorted_lookups)
    assert torch.equal(sorted_lookups, compiled().sort_lookups(slots, unique.numel()))


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
        compiled().add(RowGradientSums(total, total.sum(1)), compiled().sort_lookups(slots, 300), grad)
        totals.append(total)
    torch.set_num_threads(before)
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])
    expected = torch.ones(300, width, dtype=torch.float64).index_add_(0, slots, grad.double())
    torch.testing.assert_close(totals[0].double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("check", CHECKS)
def test_the_loops_do_what_torch_does(check: Callable[[RowKernels, torch.device], None]) -> None:
    check(compiled(), torch.device("cpu"))


def test_look_ups_too_many_for_the_cache() -> None:
    """Gathered rows and sums are written around the cache."""
    rows = stored(torch.randn(150_000, 64, generator=torch.Generator().manual_seed(0)), torch.float32)
    slots = torch.randint(0, 150_000, (140_001,), generator=torch.Generator().manual_seed(1))
    sorted_lookups = compiled().sort_lookups(slots, 150_000)
    for each in (None, sorted_lookups):
        gathered = compiled().gather(rows, None, slots, torch.float32, each)
        assert torch.equal(gathered, rows.weight[slots])
        rounded = compiled().gather(rows, None, slots, torch.bfloat16, each)
        assert torch.equal(rounded, gathered.bfloat16())
    sums, expected = (RowGradientSums.empty(150_000, 64, torch.device("cpu")) for _ in range(2))
    compiled().add(sums, sorted_lookups, gathered, fresh=True)
    PLAIN.add(expected, sorted_lookups, gathered, fresh=True)
    for ours, plain in zip(sums, expected, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_rounding_is_right_on_average_and_never_strays(dtype: torch.dtype) -> None:
    values = torch.randn(40, 50, generator=torch.Generator().manual_seed(3))
    rounded = []
    for turn in range(400):
        bits = noise(noise_key(1, turn), torch.arange(40), 0, 50)
        if dtype == torch.bfloat16:
            rounded.append(round_bfloat16(values, bits).double())
        else:
            stored_values, scale = round_int8(values, bits)
            rounded.append(stored_values.double() * scale.double().unsqueeze(1))
    unit = 2.0**-7 * values.abs() if dtype == torch.bfloat16 else values.abs().amax(1, keepdim=True) / 127
    assert ((rounded[0] - values).abs() <= 1.0001 * unit).all()
    mean = torch.stack(rounded).mean(0)
    assert ((mean - values).abs() < 6 * unit * 0.5 / 400**0.5).all()  # six deviations of a mean of 400 coins


def test_what_needs_no_rounding_stays_and_nan_stays_nan() -> None:
    values = torch.tensor([1.0, -2.5, 0.0, float("inf"), float("nan"), -float("inf")])
    result = round_bfloat16(values, torch.full((6,), 2**32 - 1)).float()
    torch.testing.assert_close(result, values, rtol=0, atol=0, equal_nan=True)
