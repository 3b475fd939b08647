"""Row space, bounds, initial rows, row optimizers against torch's, and the exchange on real ranks."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overtok_megatron.ngram.exchange import RowExchange
from overtok_megatron.ngram.optimizer import RowOptimizer, build_row_optimizer
from overtok_megatron.ngram.sizing import RowSpace, row_bounds
from overtok_megatron.ngram.table import initial_rows
from overtok_megatron.parallel.grid import GridShape, ProcessGrid


def test_the_row_space() -> None:
    space = RowSpace(ngram_order=3, num_slices=2, table_rows=10, width=4)
    assert space.sizes == (10, 12, 14, 16)
    assert space.offsets == (0, 10, 22, 36)
    assert space.total_rows == 52
    assert [space.order_of(table) for table in range(4)] == [2, 2, 3, 3]


@given(rows=st.integers(0, 10**12), ranks=st.integers(1, 70))
def test_bounds_cover_all_rows_evenly(rows: int, ranks: int) -> None:
    bounds = row_bounds(rows, ranks)
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


def optimizer_for(name: str, weight: Tensor, decay: float = 0.0, dtype: torch.dtype = torch.float32) -> RowOptimizer:
    return build_row_optimizer(name, weight, weight_decay=decay, betas=(0.8, 0.9), eps=1e-8, state_dtype=dtype)


def updates(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randperm(20, generator=generator)[:7].sort().values, torch.randn(7, 4, generator=generator))
        for _ in range(6)
    ]


@pytest.mark.parametrize("name", ["adam", "sgd", "rowwise_adagrad"])
def test_row_optimizers_against_torch_and_the_formula(name: str) -> None:
    start = initial_rows(0, 20, 4, 0.1, seed=0)
    weight, theirs = start.clone(), start.clone().requires_grad_()
    ours = optimizer_for(name, weight)
    reference: torch.optim.Optimizer | None = None
    if name == "adam":
        reference = torch.optim.SparseAdam([theirs], lr=0.01, betas=(0.8, 0.9), eps=1e-8)
    elif name == "sgd":
        reference = torch.optim.SGD([theirs], lr=0.01)
    exact, sums = start.double(), torch.zeros(20, dtype=torch.float64)
    for rows, grad in updates():
        ours.update(rows, grad, 0.01)
        if reference is not None:
            theirs.grad = torch.sparse_coo_tensor(rows[None], grad, (20, 4), check_invariants=False).coalesce()
            reference.step()
        sums[rows] += grad.double().square().mean(1)
        exact[rows] -= 0.01 * grad.double() / (sums[rows].sqrt() + 1e-8)[:, None]
    wanted = exact.float() if reference is None else theirs.detach()
    torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "sgd", "rowwise_adagrad"])
def test_only_touched_rows_move(name: str) -> None:
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


@pytest.mark.parametrize("name", ["adam", "rowwise_adagrad"])
def test_a_bfloat16_state_stays_close(name: str) -> None:
    weights = [initial_rows(0, 20, 4, 0.1, seed=0) for _ in range(2)]
    for weight, dtype in zip(weights, (torch.float32, torch.bfloat16), strict=True):
        optimizer = optimizer_for(name, weight, dtype=dtype)
        assert all(state.dtype == dtype for state in optimizer.state.values())
        for rows, grad in updates():
            optimizer.update(rows, grad, 0.01)
    assert (weights[0] - weights[1]).abs().max() < 1e-3
    assert not torch.equal(*weights)


WIDTH = 3
ASKED = {  # per case, what each rank asks for out of 11 rows; with 3 ranks bounds are 0, 4, 8, 11
    "overlapping": [[0, 5, 10, 5], [5, 5, 9], [1, 0]],
    "silent ranks": [[], [10, 3], []],
    "all from one": [[0, 1], [1, 2], [3, 0]],
}


def exchange_cases(total: int) -> dict[str, list[Tensor]]:
    """One rank's work: rows fetched, rows touched, their gradients, and the bytes counted, for every case."""
    dist.init_process_group("gloo")
    grid = ProcessGrid.create(GridShape(data=dist.get_world_size()))
    size = grid.shape.world_size
    bounds = row_bounds(total, size)
    table = initial_rows(0, total, WIDTH, 0.1, seed=0)
    exchange = RowExchange(bounds, grid.table_group)
    results = {}
    for name, asked in ASKED.items():
        ids = torch.tensor([row % total for row in asked[grid.rank % 3]], dtype=torch.int64)
        plan = exchange.plan(ids)
        rows = exchange.fetch(plan, table[bounds[grid.rank] : bounds[grid.rank + 1]])
        grad = torch.zeros_like(rows).index_add_(0, plan.slots, torch.ones(len(ids), WIDTH) * (grid.rank + 1))
        touched, total_grad = exchange.return_gradients(plan, grad)
        sent = torch.tensor(exchange.payload_bytes(plan, 4 * WIDTH))
        results[name] = [rows[plan.slots], touched + bounds[grid.rank], total_grad, sent]
    return results


@pytest.mark.parametrize(("ranks", "total"), [(1, 11), (3, 11), (3, 2)])
def test_the_exchange_is_a_lookup_and_a_sum(ranks: int, total: int) -> None:
    table = initial_rows(0, total, WIDTH, 0.1, seed=0)
    bounds = row_bounds(total, ranks)
    results = run_ranks(ranks, exchange_cases, total)
    for name, asked in ASKED.items():
        lists = [[row % total for row in asked[rank % 3]] for rank in range(ranks)]
        expected = torch.zeros(total)
        for rank, ids in enumerate(lists):
            assert torch.equal(results[rank][name][0], table[ids]), name
            for row in ids:
                expected[row] += rank + 1
        owned = torch.cat([result[name][1] for result in results])
        assert owned.tolist() == sorted({row for ids in lists for row in ids})
        assert torch.equal(torch.cat([result[name][2] for result in results])[:, 0], expected[owned])
        for rank in range(ranks):
            own = range(bounds[rank], bounds[rank + 1])
            asks = len({row for row in lists[rank] if row not in own})
            serves = sum(len({row for row in ids if row in own}) for other, ids in enumerate(lists) if other != rank)
            wire = 8 * (ranks - 1) + 8 * asks + 4 * WIDTH * (asks + serves)  # counts; ids; gradients out and rows out
            assert results[rank][name][3] == wire
