"""The exchange on real ranks, flat and in two levels: look-ups, sums, their bytes, rows renewed; and evenly spread loads."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.kernels.rows import RowGradientSums, RowKernels
from overtok_megatron.ngram.exchange import FlatExchange, is_in
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


@dataclass(frozen=True)
class Setting:
    """How many ranks exchange how many rows, and in which way; frozen: every third row has no gradient."""

    ranks: int
    total: int
    ranks_per_host: int | None
    gradient_dtype: torch.dtype = torch.float32
    frozen: bool = False

    def asked(self, case: str) -> list[list[int]]:
        """What each rank asks for, repetitions included."""
        return [[row % self.total for row in rows] for rows in ASKED[case][: self.ranks]]

    def owned(self, rank: int) -> range:
        return range(*owned_range(self.total, rank, self.ranks, self.ranks_per_host))

    def trained(self, row: int) -> bool:
        return not self.frozen or row % 3 != 0


FLAT, TWO_LEVELS = Setting(4, 11, None), Setting(4, 11, 2)
SETTINGS = {
    "one rank": Setting(1, 11, None, HALF, frozen=True),
    "three ranks": Setting(3, 11, None, HALF, frozen=True),
    "fewer rows than ranks": Setting(3, 2, None),
    "two hosts": Setting(4, 11, 2, frozen=True),
    "one host of several ranks": Setting(4, 11, 4, HALF, frozen=True),
    "hosts of one rank": Setting(4, 3, 1),
}


@dataclass(frozen=True)
class Exchanged:
    """What one rank saw of one case."""

    rows: Tensor  # [ids, WIDTH], fetched, one for each id that it asked for
    renewed: Tensor  # the same after their owners have changed some of them and told so
    own: Tensor  # [owned rows, WIDTH], this rank's own rows after that change
    index: Tensor  # owned rows that got a gradient, as places in the whole table
    gradients: Tensor  # [index, WIDTH], their sums
    squares: Tensor  # [index], as they came with the sums
    told_bytes: int  # what the exchange says that this rank sends
    sent_bytes: int  # what it handed to torch for other ranks
    network_bytes: int  # what of it leaves the host


def no_thirds(row_ids: Tensor) -> Tensor:
    """Every third row is frozen."""
    return row_ids % 3 != 0


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes, one number for each all-to-all within, that this rank sends to others."""
    counts: list[int] = []
    original = dist.all_to_all_single

    def counted(output: Tensor, sent: Tensor, out: Any = None, into: Any = None, **others: Any) -> Any:
        group = others["group"]
        keeps = sent.shape[0] // dist.get_world_size(group) if into is None else into[dist.get_rank(group)]
        counts.append((sent.shape[0] - keeps) * sent[:1].nbytes if sent.shape[0] else 0)
        return original(output, sent, out, into, **others)

    dist.all_to_all_single = counted
    try:
        yield counts
    finally:
        dist.all_to_all_single = original


def exchange_case(setting: Setting, grid: ProcessGrid, case: str) -> Exchanged:
    """Fetch rows, send each look-up's gradient of rank + 1 back to their owners, and renew the rows that changed."""
    rank, own_range = grid.rank, setting.owned(grid.rank)
    own = initial_rows(own_range.start, own_range.stop, WIDTH, 0.1, seed=0)
    exchange = make_exchange(
        setting.total,
        grid.table_group,
        ranks_per_host=setting.ranks_per_host,
        kernels=RowKernels(),
        gradient_dtype=setting.gradient_dtype,
        trained_rows=no_thirds if setting.frozen else None,
    )
    ids = torch.tensor(setting.asked(case)[rank], dtype=torch.int64)
    changed = torch.arange(len(own_range))[rank % 2 :: 2]  # some of every owner's rows
    with counted_bytes() as counts:
        plan = exchange.plan(ids)
        rows = exchange.start_fetch(plan, lambda index: own[index])()
        gradient = torch.zeros_like(rows).index_add_(0, plan.slots, torch.ones(len(ids), WIDTH) * (rank + 1))
        index, sums = exchange.send_gradients(plan, RowGradientSums(gradient, gradient.square().sum(1)))
    told = exchange.payload_bytes(plan, 4 * WIDTH, setting.gradient_dtype.itemsize * WIDTH)
    fetched = rows[plan.slots].clone()
    exchange.tell_changes(plan, lambda local_rows: is_in(local_rows, changed))
    own[changed] += 1.0
    slots, values = exchange.fetch_changed(plan, lambda index: own[index])
    rows[slots] = values
    return Exchanged(
        rows=fetched,
        renewed=rows[plan.slots],
        own=own,
        index=index + own_range.start,
        gradients=sums.total,
        squares=sums.row_squared_norms,
        told_bytes=told,
        sent_bytes=sum(counts),
        network_bytes=exchange.network_bytes(plan, 12, 12) if isinstance(exchange, TwoLevelExchange) else told,
    )


def exchange_cases(setting: Setting) -> dict[str, Exchanged]:
    """One rank's work: every case."""
    dist.init_process_group("gloo")
    grid = ProcessGrid.create(GridShape(data=dist.get_world_size()))
    return {case: exchange_case(setting, grid, case) for case in ASKED}


SIZES = [0, 3, 40, 5, 0, 200, 210, 1, 300]  # ids that rank 0 looks up in one plan after the other


def plans_of_growing_size() -> list[tuple[list[int], list[int], int]]:
    """One rank's work: of each plan the rows that it is asked for, its counts, and how many messages it took."""
    dist.init_process_group("gloo")
    grid = ProcessGrid.create(GridShape(data=dist.get_world_size()))
    exchange = make_exchange(
        1000, grid.table_group, ranks_per_host=None, kernels=RowKernels(), gradient_dtype=torch.float32
    )
    assert isinstance(exchange, FlatExchange)
    found = []
    for turn, size in enumerate(SIZES):
        with counted_bytes() as messages:
            plan = exchange.plan(asked_in_turn(turn, size, grid.rank))
        found.append((plan.requested_rows.tolist(), plan.recv_counts, len(messages)))
    return found


def asked_in_turn(turn: int, size: int, rank: int) -> Tensor:
    """Rank 0 looks up rows of all ranks, or all of one rank; rank 1 nothing; rank 2 a few."""
    first = (0, 250, 400, 790)[turn % 4]
    ids = {0: torch.arange(first, first + size) if turn % 2 else torch.arange(size) * 997 % 1000}
    return ids.get(rank, torch.arange(5 if rank == 2 else 0) * 199)


def test_counts_and_ids_are_one_message_while_they_fit() -> None:
    """Whatever the sizes, the same ids arrive; every rank knows alike when they need a second message."""
    ranks = 3
    bounds = split_bounds(1000, ranks)
    results = run_ranks(ranks, plans_of_growing_size)
    capacity = 0
    for turn, size in enumerate(SIZES):
        asked = [asked_in_turn(turn, size, rank).unique() for rank in range(ranks)]
        most = 0
        for owner, (begin, end) in enumerate(pairwise(bounds)):
            wanted = [ids[(ids >= begin) & (ids < end)] - begin for ids in asked]
            requested, counts, _ = results[owner][turn]
            assert requested == torch.cat(wanted).tolist()
            assert counts == [len(ids) for ids in wanted]
            most = max(most, *counts)
        assert {results[rank][turn][2] for rank in range(ranks)} == {1 if most <= capacity else 2}
        capacity = max(capacity, most + most // 8 if most > capacity else 0)
    assert {messages for *_, messages in results[0]} == {1, 2}


Results = list[dict[str, Exchanged]]  # by rank, then by case


@pytest.fixture(scope="module", params=SETTINGS)
def exchanged(request: pytest.FixtureRequest) -> tuple[Setting, Results]:
    """What all ranks of a setting saw, from one start of its processes."""
    setting = SETTINGS[request.param]
    return setting, run_ranks(setting.ranks, exchange_cases, setting)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_row_has_one_owner(name: str) -> None:
    setting = SETTINGS[name]
    ranges = [owned_range(setting.total, rank, setting.ranks, setting.ranks_per_host) for rank in range(setting.ranks)]
    assert sorted(ranges) == list(pairwise(split_bounds(setting.total, setting.ranks)))


@pytest.mark.parametrize("case", ASKED)
def test_a_look_up_gives_the_tables_rows(exchanged: tuple[Setting, Results], case: str) -> None:
    setting, results = exchanged
    table = initial_rows(0, setting.total, WIDTH, 0.1, seed=0)
    for rank, ids in enumerate(setting.asked(case)):
        assert torch.equal(results[rank][case].rows, table[ids]), rank


@pytest.mark.parametrize("case", ASKED)
def test_rows_that_their_owners_change_are_renewed(exchanged: tuple[Setting, Results], case: str) -> None:
    setting, results = exchanged
    table = torch.empty(setting.total, WIDTH)
    for rank, result in enumerate(results):
        owned = setting.owned(rank)
        table[owned.start : owned.stop] = result[case].own
    for rank, ids in enumerate(setting.asked(case)):
        assert torch.equal(results[rank][case].renewed, table[ids]), rank


@pytest.mark.parametrize("case", ASKED)
def test_gradients_of_trained_rows_reach_their_owners_in_order(exchanged: tuple[Setting, Results], case: str) -> None:
    """Each row once, whoever asked for it; frozen rows have none."""
    setting, results = exchanged
    wanted = {row for ids in setting.asked(case) for row in ids if setting.trained(row)}
    for rank, result in enumerate(results):
        assert result[case].index.tolist() == [row for row in setting.owned(rank) if row in wanted], rank


@pytest.mark.parametrize("case", ASKED)
def test_gradients_are_summed_over_look_ups_and_ranks(exchanged: tuple[Setting, Results], case: str) -> None:
    setting, results = exchanged
    expected = torch.zeros(setting.total, WIDTH)
    for rank, ids in enumerate(setting.asked(case)):
        for row in ids:
            expected[row] += rank + 1
    for rank, result in enumerate(results):
        assert torch.equal(result[case].gradients, expected[result[case].index]), rank


@pytest.mark.parametrize("case", ASKED)
def test_squares_are_those_of_the_sums(exchanged: tuple[Setting, Results], case: str) -> None:
    for rank, result in enumerate(exchanged[1]):
        assert torch.equal(result[case].squares, result[case].gradients.square().sum(1)), rank


@pytest.mark.parametrize("case", ASKED)
def test_the_bytes_that_are_told_are_those_that_are_sent(exchanged: tuple[Setting, Results], case: str) -> None:
    """But for the largest count, which goes to every other rank beside the count that is for it."""
    setting = exchanged[0]
    in_host = setting.ranks_per_host or setting.ranks
    others = (in_host - 1) + (setting.ranks // in_host - 1)
    for rank, result in enumerate(exchanged[1]):
        assert result[case].told_bytes + 8 * others == result[case].sent_bytes, rank


@pytest.mark.parametrize("exchanged", ["one rank", "three ranks", "fewer rows than ranks"], indirect=True)
@pytest.mark.parametrize("case", ASKED)
def test_a_flat_exchange_sends_each_distinct_row_once(exchanged: tuple[Setting, Results], case: str) -> None:
    """Counts and ids of what a rank asks others for, gradients of what of it is trained, and rows that others ask it for."""
    setting, results = exchanged
    asked = [set(ids) for ids in setting.asked(case)]
    for rank, result in enumerate(results):
        own = set(setting.owned(rank))
        foreign = asked[rank] - own
        served = sum(len(other & own) for number, other in enumerate(asked) if number != rank)
        gradients = sum(setting.trained(row) for row in foreign) * setting.gradient_dtype.itemsize * WIDTH
        counts_and_ids = 8 * (setting.ranks - 1) + 8 * len(foreign)
        assert result[case].told_bytes == counts_and_ids + gradients + served * 4 * WIDTH, rank


def test_two_levels_send_a_hosts_common_rows_once() -> None:
    """Everybody asks for all rows: across hosts goes what one rank of a host wants, not what both want."""
    flat, levels = (run_ranks(4, exchange_cases, setting) for setting in (FLAT, TWO_LEVELS))
    across = sum(result["everything"].network_bytes for result in levels)
    hosts = [[0, 1], [2, 3]]
    foreign = sum(len(TWO_LEVELS.owned(owner)) for host in hosts for owner in range(4) if owner not in host)
    assert across == 4 * 8 + foreign * (8 + 12 + 12)
    assert across < sum(result["everything"].network_bytes for result in flat) / 2


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
