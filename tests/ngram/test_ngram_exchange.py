"""The exchange on real ranks, flat and in two levels: look-ups, sums, their bytes, rows renewed; and evenly spread loads."""

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.kernels.rows import RowGradientSums, RowKernels
from overtok_megatron.ngram.ids import NgramHash
from overtok_megatron.ngram.placement import make_exchange, owned_range
from overtok_megatron.ngram.row_space import RowSpace
from overtok_megatron.ngram.row_store import initial_rows
from overtok_megatron.ngram.two_level_exchange import TwoLevelExchange
from overtok_megatron.parallel.grid import GridShape, ProcessGrid
from overtok_megatron.parallel.splits import split_bounds
from support.distributed_harness import run_ranks

WIDTH = 3
ASKED = {  # per case, what each rank asks for, modulo the number of rows
    "overlapping": [[0, 5, 10, 5], [5, 5, 9], [1, 0], [0, 5]],
    "silent ranks": [[], [10, 3], [], []],
    "all from one": [[0, 1], [1, 2], [3, 0], [0]],
    "everything": [list(range(11))] * 4,
}
HALF = torch.bfloat16


def no_thirds(row_ids: Tensor) -> Tensor:
    """Every third row is frozen."""
    return row_ids % 3 != 0


def rank_cases(
    total: int, ranks_per_host: int | None, gradient_dtype: torch.dtype, frozen: bool = False
) -> dict[str, dict[str, Any]]:
    """One rank's work: rows fetched, gradients summed, bytes counted and bytes that really went out, rows renewed."""
    dist.init_process_group("gloo")
    grid = ProcessGrid.create(GridShape(data=dist.get_world_size()))
    rank, size = grid.rank, grid.shape.world_size
    start, stop = owned_range(total, rank, size, ranks_per_host)
    table = initial_rows(0, total, WIDTH, 0.1, seed=0)
    own = table[start:stop].clone()
    exchange = make_exchange(
        total,
        grid.table_group,
        ranks_per_host=ranks_per_host,
        kernels=RowKernels(),
        gradient_dtype=gradient_dtype,
        trained_rows=no_thirds if frozen else None,
    )
    went_out = 0
    original = dist.all_to_all_single

    def counted(output: Tensor, sent: Tensor, out: Any = None, into: Any = None, group: Any = None) -> Any:
        nonlocal went_out
        keeps = sent.shape[0] // dist.get_world_size(group) if into is None else into[dist.get_rank(group)]
        went_out += (sent.shape[0] - keeps) * sent[:1].nbytes if sent.shape[0] else 0
        return original(output, sent, out, into, group=group)

    dist.all_to_all_single = counted
    results: dict[str, dict[str, Any]] = {}
    for name, asked in ASKED.items():
        ids = torch.tensor([row % total for row in asked[rank % 4]], dtype=torch.int64)
        went_out = 0
        plan = exchange.plan(ids)
        rows = exchange.fetch(plan, lambda index: own[index])
        grad = torch.zeros_like(rows).index_add_(0, plan.slots, torch.ones(len(ids), WIDTH) * (rank + 1))
        index, sums = exchange.return_gradients(plan, RowGradientSums(grad, grad.square().sum(1)))
        told = exchange.payload_bytes(plan, 4 * WIDTH, gradient_dtype.itemsize * WIDTH)
        results[name] = {
            "rows": rows[plan.slots].clone(),
            "index": index + start,
            "grad": sums.total,
            "squares": sums.squares,
            "bytes": (told, went_out),
            "network": exchange.network_bytes(plan, 12, 12) if isinstance(exchange, TwoLevelExchange) else told,
        }
        changed = torch.arange(stop - start)[rank % 2 :: 2]  # some of every owner's rows
        own[changed] += 1.0
        exchange.refresh(plan, rows, changed, lambda index: own[index])
        results[name]["renewed"] = rows[plan.slots]
        results[name]["own"] = own.clone()
        own.copy_(table[start:stop])
    dist.all_to_all_single = original
    return results


@pytest.mark.parametrize(
    ("ranks", "total", "ranks_per_host", "gradient_dtype", "frozen"),
    [(1, 11, None, HALF, True), (3, 11, None, HALF, True), (3, 2, None, torch.float32, False),
     (4, 11, 2, torch.float32, True), (4, 11, 4, HALF, True),
     (4, 3, 1, torch.float32, False)],
)  # fmt: skip
def test_a_lookup_and_a_sum(
    ranks: int, total: int, ranks_per_host: int | None, gradient_dtype: torch.dtype, frozen: bool
) -> None:
    table = initial_rows(0, total, WIDTH, 0.1, seed=0)
    results = run_ranks(ranks, rank_cases, total, ranks_per_host, gradient_dtype, frozen)
    ranges = [owned_range(total, rank, ranks, ranks_per_host) for rank in range(ranks)]
    assert sorted(ranges) == list(pairwise(split_bounds(total, ranks)))
    for name, asked in ASKED.items():
        lists = [[row % total for row in asked[rank % 4]] for rank in range(ranks)]
        expected, renewed = torch.zeros(total), torch.empty(total, WIDTH)
        for rank, ids in enumerate(lists):
            for row in ids:
                expected[row] += rank + 1
            renewed[slice(*ranges[rank])] = results[rank][name]["own"]
        for rank, ids in enumerate(lists):
            own = results[rank][name]
            assert torch.equal(own["rows"], table[ids]), name
            assert torch.equal(own["renewed"], renewed[ids]), name
            told, went_out = own["bytes"]
            assert told == went_out
            if ranks_per_host is None:
                mine = range(*ranges[rank])
                asked = {row for row in ids if row not in mine}
                returned = len({row for row in asked if not (frozen and row % 3 == 0)})
                others = [other for number, other in enumerate(lists) if number != rank]
                serves = sum(len({row for row in other if row in mine}) for other in others)
                gradient = gradient_dtype.itemsize * WIDTH
                assert told == 8 * (ranks - 1) + len(asked) * 8 + returned * gradient + serves * 4 * WIDTH
        owned = torch.cat([result[name]["index"] for result in results])
        moving = {row for ids in lists for row in ids if not (frozen and row % 3 == 0)}
        assert owned.sort().values.tolist() == sorted(moving)
        grads = torch.cat([result[name]["grad"] for result in results])
        assert torch.equal(grads[:, 0], expected[owned])
        assert torch.equal(torch.cat([result[name]["squares"] for result in results]), grads.square().sum(1))
        assert all((result[name]["index"].diff() > 0).all() for result in results)


def test_two_levels_send_a_hosts_common_rows_once() -> None:
    """Everybody asks for all rows: across hosts goes what one rank of a host wants, not what both want."""
    flat = run_ranks(4, rank_cases, 11, None, torch.float32)
    levels = run_ranks(4, rank_cases, 11, 2, torch.float32)
    across = sum(result["everything"]["network"] for result in levels)
    hosts = [[0, 1], [2, 3]]
    ranges = [range(*owned_range(11, rank, 4, 2)) for rank in range(4)]
    foreign = sum(len(ranges[owner]) for host in hosts for owner in range(4) if owner not in host)
    assert across == 4 * 8 + foreign * (8 + 12 + 12)
    assert across < sum(result["everything"]["network"] for result in flat) / 2


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_owners_serve_equal_shares_of_real_text(ranks: int) -> None:
    """The busiest owner's rows over the mean, where each rank asks once for the distinct rows of its own part of the text."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(path.read_text(encoding="utf-8") for path in sotu_files()[:40]))
    vocabulary = {word: number for number, (word, _) in enumerate(Counter(words).most_common())}  # frequent ones first
    text, vocab = torch.tensor([vocabulary[word] for word in words[: 64 * 2048]]), len(vocabulary)
    space = RowSpace(ngram_order=3, num_slices=2, table_rows=round(128.62 * vocab), width=1)
    family = NgramHash(space=space, base=vocab, pad_id=0, boundary="ignore", eod_id=0)
    ids = family.row_ids(text.view(-1, 128))
    bounds = torch.tensor(split_bounds(space.total_rows, ranks))
    load = torch.zeros(ranks)
    for part in ids.chunk(ranks):
        load += torch.searchsorted(part.unique(), bounds).diff()
    assert load.max() / load.mean() < 1.1
