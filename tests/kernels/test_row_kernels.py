"""The compiled loops over rows against torch's operators: equal where no rounding is in play, on any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overtok_megatron.kernels.build import load_library
from overtok_megatron.kernels.cpu_rows import CpuRowKernels
from overtok_megatron.kernels.rows import (
    RowKernels,
    RowRule,
    RowStep,
    TableRows,
    noise,
    noise_key,
    round_bfloat16,
    round_int8,
)

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


STATES: dict[RowRule, dict[str, bool]] = {  # name -> one value an element
    "rowwise_adagrad": {"square_sum": False},
    "rowwise_adam": {"exp_avg": True, "exp_avg_sq": False},
    "adam": {"exp_avg": True, "exp_avg_sq": True},
    "sgd": {},
}
FORMATS = [torch.float32, torch.bfloat16, torch.int8]


def stored(values: Tensor, dtype: torch.dtype) -> TableRows:
    """Rows far into a row space of more than 2^32."""
    if dtype == torch.int8:
        return TableRows(*round_int8(values, torch.full(values.shape, 2**31)), first=2**33 + 5)
    return TableRows(values.to(dtype), first=2**33 + 5)


def copy_of(rows: TableRows) -> TableRows:
    return TableRows(rows.weight.clone(), None if rows.scale is None else rows.scale.clone(), rows.first)


@pytest.mark.parametrize("width", [1, 7, 24, 64])
@pytest.mark.parametrize("dtype", FORMATS)
def test_look_ups(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = stored(torch.randn(500, width, generator=generator), dtype)
    index = torch.randperm(500, generator=generator)[:123]
    slots = torch.randint(0, 123, (5, 40), generator=generator)
    for wanted in (torch.float32, torch.bfloat16):
        assert torch.equal(compiled().fetch(rows, index, wanted), PLAIN.fetch(rows, index, wanted))
        for where in (index, None):
            ours = compiled().gather(rows, where, slots, wanted)
            assert ours.shape == (5, 40, width)
            assert torch.equal(ours, PLAIN.gather(rows, where, slots, wanted))
    assert compiled().gather(rows, None, slots[:0], torch.float32).shape == (0, 40, width)


def test_look_ups_too_many_for_the_cache() -> None:
    rows = stored(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)), torch.float32)
    slots = torch.randint(0, 1000, (140_001,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(compiled().gather(rows, None, slots, torch.float32), rows.weight[slots])


@pytest.mark.parametrize("rule", STATES)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("width", [1, 24])
def test_updates_move_the_named_rows_alone(
    rule: RowRule, state_dtype: torch.dtype, dtype: torch.dtype, width: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    index = torch.randperm(500, generator=generator)[:123]
    start = stored(torch.randn(500, width, generator=generator), dtype)
    states = {
        name: torch.rand((500, width) if wide else (500,), generator=generator).to(state_dtype)
        for name, wide in STATES[rule].items()
    }
    grad = torch.randn(123, width, generator=generator)
    results = []
    for kernels in (PLAIN, compiled()):
        rows, state = copy_of(start), {name: values.clone() for name, values in states.items()}
        kernels.update(rows, state, index, grad, RowStep(rule, 0.1, 0.97, (0.8, 0.9), 1e-8, 0.5, noise_key(3, 17)))
        results.append((rows, state))
    (expected, expected_state), (rows, state) = results
    # the last bit of the arithmetic may differ, and then, rarely, the way that a value is rounded
    away = (rows.weight.double() - expected.weight.double()).abs()
    if dtype == torch.float32:
        torch.testing.assert_close(rows.weight, expected.weight, rtol=1e-5, atol=1e-6)
    else:
        assert (away > 0).double().mean() < 0.01
        assert away.max() <= (1 if dtype == torch.int8 else 2**-6)
    if rows.scale is not None and expected.scale is not None and start.scale is not None:
        torch.testing.assert_close(rows.scale, expected.scale, rtol=1e-5, atol=0)
    for name, values in state.items():
        torch.testing.assert_close(values.float(), expected_state[name].float(), rtol=2**-7, atol=1e-7)
    others = torch.ones(500, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(rows.weight[others], start.weight[others])
    for name, values in state.items():
        assert torch.equal(values[others], states[name][others])
        assert not torch.equal(values, states[name])


@pytest.mark.parametrize("kernels", [PLAIN, compiled() if LIBRARY else PLAIN])
def test_exact_steps_round_to_the_same_bits(kernels: RowKernels) -> None:
    """Multiples of 2^-10 and a power of two as rate: the arithmetic is exact, so only the rounding is in play."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(-4000, 4000, (60, 33), generator=generator) * 2.0**-10
    grad = torch.randint(-4000, 4000, (60, 33), generator=generator) * 2.0**-10
    start = stored(values, torch.bfloat16)
    exact = start.weight.double() - 2.0**-6 * grad.double()
    step = RowStep("sgd", 2.0**-6, 1.0, (0.0, 0.0), 0.0, 1.0, noise_key(5, 9))
    rows = copy_of(start)
    kernels.update(rows, {}, torch.arange(60), grad, step)
    plain = copy_of(start)
    PLAIN.update(plain, {}, torch.arange(60), grad, step)
    assert torch.equal(rows.weight, plain.weight)
    away = (rows.weight.double() - exact).abs()
    assert (away < 2.0**-7 * exact.abs() + 1e-30).all()  # one of the two neighbours
    assert (away > 0).any()


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


@pytest.mark.parametrize("size", [0, 1, 16383, 16385, 100_003])
def test_the_sum_of_squares(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1e3
    total = compiled().square_sum(values)
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(PLAIN.square_sum(values).item(), rel=1e-12)
