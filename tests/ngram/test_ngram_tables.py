"""Row space, bounds, initial rows, row optimizers against torch's, and what rounding of stored rows does."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overtok_megatron.kernels.rows import RowRule, TableRows, row_id, table_rows_of
from overtok_megatron.ngram.row_optimizer import RowOptimizer
from overtok_megatron.ngram.row_space import STRIPES, RowSpace, TableGroup
from overtok_megatron.ngram.row_store import initial_rows
from overtok_megatron.parallel.splits import split_bounds
from support.reference import python_row_id


def test_the_row_space() -> None:
    space = RowSpace(ngram_order=3, num_slices=2, table_rows=10, width=4)
    assert space.sizes == (10, 12, 14, 16)
    assert space.total_rows == 52
    assert space.orders == (2, 2, 3, 3)


def test_added_tables_follow_with_sizes_of_their_own() -> None:
    added = (TableGroup((4, 2), 2, 30, frozen=True), TableGroup((5,), 1, 7))
    space = RowSpace(ngram_order=3, num_slices=1, table_rows=10, width=4, added=added)
    assert space.sizes == (10, 12, 30, 32, 34, 36, 7)
    assert space.orders == (2, 3, 4, 4, 2, 2, 5)
    assert (space.num_base_tables, space.num_tables, space.longest, space.total_rows) == (2, 7, 5, 161)
    for table in range(7):
        assert (space.is_trained(space.row_ids(table)) == (table not in (2, 3, 4, 5))).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40) | st.integers(900, 1000), min_size=1, max_size=9), st.integers(1, 16))
def test_every_row_has_an_id_of_its_own(table_sizes: list[int], stripes: int) -> None:
    sizes = tuple(table_sizes)
    row_ids = [row_id(table, torch.arange(size), sizes, stripes) for table, size in enumerate(sizes)]
    assert torch.cat(row_ids).sort().values.tolist() == list(range(sum(sizes)))
    for table, own in enumerate(row_ids):
        assert own.tolist() == [python_row_id(table, row, sizes, stripes) for row in range(sizes[table])]
        tables, rows = table_rows_of(own, sizes, stripes)
        assert rows.tolist() == list(range(sizes[table]))
        assert (tables == table).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1, 7, 1009, 10**6, 10**6 + 2, 2**31 - 1]), min_size=1, max_size=12), st.data())
def test_row_ids_are_undone_whatever_the_sizes(table_sizes: list[int], data: st.DataObject) -> None:
    sizes = tuple(table_sizes)
    for table, size in enumerate(sizes):
        rows = torch.tensor([0, size - 1, *data.draw(st.lists(st.integers(0, size - 1), max_size=8))])
        row_ids = row_id(table, rows, sizes, STRIPES)
        assert (row_ids >= 0).all() and (row_ids < sum(sizes)).all()
        tables, back = table_rows_of(row_ids, sizes, STRIPES)
        assert (tables == table).all() and torch.equal(back, rows)


@given(rows=st.integers(0, 10**12), ranks=st.integers(1, 70))
def test_bounds_cover_all_rows_evenly(rows: int, ranks: int) -> None:
    bounds = split_bounds(rows, ranks)
    sizes = [end - begin for begin, end in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, rows, ranks)
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 19), cuts=st.lists(st.integers(0, 300), max_size=4), start=st.integers(0, 10**9))
def test_rows_do_not_depend_on_the_split(width: int, cuts: list[int], start: int) -> None:
    edges = [start, *sorted(start + cut for cut in cuts), start + 300]
    parts = [initial_rows(a, b, width, 0.02, seed=3) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), initial_rows(start, start + 300, width, 0.02, seed=3))


def test_initial_rows_are_spread_as_said() -> None:
    rows = initial_rows(0, 40_000, 33, 0.02, seed=1)  # more than one chunk of draws
    assert rows.std().item() == pytest.approx(0.02, rel=1e-2)
    assert abs(rows.mean().item()) < 1e-4
    assert not torch.equal(rows, initial_rows(0, 40_000, 33, 0.02, seed=2))
    assert rows.unique().numel() > 0.9 * min(rows.numel(), 2**24) * 0.9
    assert not initial_rows(5, 9, 33, 0.0, seed=1).any()


def optimizer_for(
    name: RowRule, weight: Tensor, decay: float = 0.0, dtype: torch.dtype = torch.float32
) -> RowOptimizer:
    rows = TableRows(weight)
    return RowOptimizer(name, rows, weight_decay=decay, betas=(0.8, 0.9), eps=1e-8, state_dtype=dtype)


def updates(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randperm(20, generator=generator)[:7].sort().values, torch.randn(7, 4, generator=generator))
        for _ in range(6)
    ]


@pytest.mark.parametrize("name", ["adam", "sgd", "rowwise_adagrad", "rowwise_adam"])
def test_row_optimizers_against_torch_and_the_formula(name: RowRule) -> None:
    start = initial_rows(0, 20, 4, 0.1, seed=0)
    weight, theirs = start.clone(), start.clone().requires_grad_()
    ours = optimizer_for(name, weight)
    reference: torch.optim.Optimizer | None = None
    if name == "adam":
        reference = torch.optim.SparseAdam([theirs], lr=0.01, betas=(0.8, 0.9), eps=1e-8)
    elif name == "sgd":
        reference = torch.optim.SGD([theirs], lr=0.01)
    exact, sums = start.double(), torch.zeros(20, dtype=torch.float64)
    means = torch.zeros(20, 4, dtype=torch.float64)
    for number, (rows, grad) in enumerate(updates(), start=1):
        ours.update(rows, grad, 0.01)
        if reference is not None:
            theirs.grad = torch.sparse_coo_tensor(rows[None], grad, (20, 4), check_invariants=False).coalesce()
            reference.step()
        if (
            name == "rowwise_adam"
        ):  # one second moment per row, of its mean square; bias corrected by the step of the run
            means[rows] = 0.8 * means[rows] + 0.2 * grad.double()
            sums[rows] = 0.9 * sums[rows] + 0.1 * grad.double().square().mean(1)
            root = (sums[rows] / (1 - 0.9**number)).sqrt()[:, None]
            exact[rows] -= 0.01 * means[rows] / (1 - 0.8**number) / (root + 1e-8)
        else:
            sums[rows] += grad.double().square().mean(1)
            exact[rows] -= 0.01 * grad.double() / (sums[rows].sqrt() + 1e-8)[:, None]
    wanted = exact.float() if reference is None else theirs.detach()
    torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "sgd", "rowwise_adagrad", "rowwise_adam"])
def test_only_touched_rows_move(name: RowRule) -> None:
    weight = initial_rows(0, 20, 4, 0.1, seed=0)
    before = weight.clone()
    optimizer = optimizer_for(name, weight, decay=0.5)
    rows = torch.tensor([2, 5])
    optimizer.update(rows, torch.zeros(2, 4), 0.1)
    others = torch.ones(20, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(weight[others], before[others])
    torch.testing.assert_close(weight[rows], before[rows] * 0.95)  # decoupled decay alone
    optimizer.update(torch.empty(0, dtype=torch.int64), torch.empty(0, 4), 0.1)
    assert optimizer.steps == 2  # all ranks count alike


@pytest.mark.parametrize("name", ["adam", "rowwise_adagrad", "rowwise_adam"])
def test_a_bfloat16_state_stays_close(name: RowRule) -> None:
    weights = [initial_rows(0, 20, 4, 0.1, seed=0) for _ in range(2)]
    for weight, dtype in zip(weights, (torch.float32, torch.bfloat16), strict=True):
        optimizer = optimizer_for(name, weight, dtype=dtype)
        assert all(state.dtype == dtype for state in optimizer.state.values())
        for rows, grad in updates():
            optimizer.update(rows, grad, 0.01)
    assert (weights[0] - weights[1]).abs().max() < 1e-3
    assert not torch.equal(*weights)
