"""The exchange on real ranks, flat and in two levels: look-ups, sums, their bytes, rows renewed; and evenly spread loads."""

import re
from collections import Counter
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Setting:
    """How many ranks exchange how many rows, in which way."""

    ranks: int
    total: int
    ranks_per_host: int | None = None
    gradient_dtype: torch.dtype = torch.float32
    frozen: bool = False

    def asked(self, name: str, rank: int) -> list[int]:
        """The row ids that a rank looks up in one case of ASKED."""
        return [row % self.total for row in ASKED[name][rank % 4]]

    def owned(self, rank: int) -> range:
        return range(*owned_range(self.total, rank, self.ranks, self.ranks_per_host))

    def is_trained(self, row: int) -> bool:
        return not self.frozen or row % 3 != 0

    def table(self) -> Tensor:
        return initial_rows(0, self.total, WIDTH, 0.1, seed=0)


@dataclass
class Outcome:
    """Of one case on one rank: what was fetched, summed, sent, and fetched again after some of every owner's rows changed."""

    rows: Tensor
    touched: Tensor
    sums: RowGradientSums
    payload_bytes: int
    sent_bytes: int
    network_bytes: int
    renewed: Tensor
    own_rows: Tensor


class SentBytes:
    """Counts what all-to-alls send to other ranks, while it stands in for torch's."""

    def __init__(self) -> None:
        self.original, self.count = dist.all_to_all_single, 0

    def __call__(self, output: Tensor, sent: Tensor, out: Any = None, into: Any = None, group: Any = None) -> Any:
        keeps = sent.shape[0] // dist.get_world_size(group) if into is None else into[dist.get_rank(group)]
        self.count += (sent.shape[0] - keeps) * sent[:1].nbytes if sent.shape[0] else 0
        return self.original(output, sent, out, into, group=group)


def exchanged(setting: Setting) -> dict[str, Outcome]:
    """One rank's outcome of each case. Gradients of rank r's look-ups are r + 1."""
    dist.init_process_group("gloo")
    grid = ProcessGrid.create(GridShape(data=dist.get_world_size()))
    start, stop = owned_range(setting.total, grid.rank, setting.ranks, setting.ranks_per_host)
    own = setting.table()[start:stop]
    exchange = make_exchange(
        setting.total,
        grid.table_group,
        ranks_per_host=setting.ranks_per_host,
        kernels=RowKernels(),
        gradient_dtype=setting.gradient_dtype,
        trained_rows=no_thirds if setting.frozen else None,
    )
    row_bytes, grad_bytes = 4 * WIDTH, setting.gradient_dtype.itemsize * WIDTH
    outcomes = {}
    for name in ASKED:
        ids = torch.tensor(setting.asked(name, grid.rank), dtype=torch.int64)
        dist.all_to_all_single = counted = SentBytes()
        plan = exchange.plan(ids)
        rows = exchange.fetch(plan, lambda index: own[index])
        grad = torch.zeros_like(rows).index_add_(0, plan.slots, torch.ones(len(ids), WIDTH) * (grid.rank + 1))
        touched, sums = exchange.return_gradients(plan, RowGradientSums(grad, grad.square().sum(1)))
        dist.all_to_all_single = counted.original
        payload = exchange.payload_bytes(plan, row_bytes, grad_bytes)
        is_flat = setting.ranks_per_host is None
        network = payload if is_flat else exchange.network_bytes(plan, row_bytes, grad_bytes)
        fetched = rows[plan.slots].clone()
        changed = torch.arange(stop - start)[grid.rank % 2 :: 2]  # some of every owner's rows
        own[changed] += 1.0
        exchange.refresh(plan, rows, changed, lambda index: own[index])
        outcomes[name] = Outcome(
            fetched, touched + start, sums, payload, counted.count, network, rows[plan.slots], own.clone()
        )
        own.copy_(setting.table()[start:stop])
    return outcomes


SETTINGS = [
    Setting(1, 11, gradient_dtype=HALF, frozen=True),
    Setting(3, 11, gradient_dtype=HALF, frozen=True),
    Setting(3, 2),
    Setting(4, 11, ranks_per_host=2, frozen=True),
    Setting(4, 11, ranks_per_host=4, gradient_dtype=HALF, frozen=True),
    Setting(4, 3, ranks_per_host=1),
]
Outcomes = tuple[Setting, dict[str, list[Outcome]]]


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """A setting, and the outcomes of all its ranks by case."""
    setting: Setting = request.param
    results = run_ranks(setting.ranks, exchanged, setting)
    return setting, {name: [result[name] for result in results] for name in ASKED}


def test_every_rank_gets_the_rows_that_it_asks_for(outcomes: Outcomes) -> None:
    setting, cases = outcomes
    for name, ranks in cases.items():
        for rank, outcome in enumerate(ranks):
            assert torch.equal(outcome.rows, setting.table()[setting.asked(name, rank)]), name


def test_owners_get_the_sum_of_all_ranks_gradients(outcomes: Outcomes) -> None:
    """Of each trained row that was looked up, once; and its square. Local rows ascend."""
    setting, cases = outcomes
    for name, ranks in cases.items():
        expected = torch.zeros(setting.total)
        for rank in range(setting.ranks):
            for row in setting.asked(name, rank):
                expected[row] += rank + 1
        touched = torch.cat([outcome.touched for outcome in ranks])
        looked_up = {row for rank in range(setting.ranks) for row in setting.asked(name, rank)}
        assert touched.sort().values.tolist() == sorted(filter(setting.is_trained, looked_up)), name
        total = torch.cat([outcome.sums.total for outcome in ranks])
        assert torch.equal(total, expected[touched].unsqueeze(1).expand_as(total)), name
        assert torch.equal(torch.cat([outcome.sums.squares for outcome in ranks]), total.square().sum(1)), name
        for rank, outcome in enumerate(ranks):
            assert (outcome.touched.diff() > 0).all()
            assert set(outcome.touched.tolist()) <= set(setting.owned(rank))


def test_payload_bytes_are_what_is_sent(outcomes: Outcomes) -> None:
    """Over a flat exchange also by the formula: counts, ids asked for, rows served, gradients of trained rows returned."""
    setting, cases = outcomes
    gradient = setting.gradient_dtype.itemsize * WIDTH
    for name, ranks in cases.items():
        for rank, outcome in enumerate(ranks):
            assert outcome.payload_bytes == outcome.sent_bytes, name
            if setting.ranks_per_host is not None:
                continue
            own = setting.owned(rank)
            asked = {row for row in setting.asked(name, rank) if row not in own}
            others = [other for other in range(setting.ranks) if other != rank]
            served = sum(len({row for row in setting.asked(name, other) if row in own}) for other in others)
            returned = sum(map(setting.is_trained, asked))
            expected = 8 * (setting.ranks - 1) + 8 * len(asked) + served * 4 * WIDTH + returned * gradient
            assert outcome.payload_bytes == expected, name


def test_fetched_rows_are_renewed(outcomes: Outcomes) -> None:
    """As those of a step fetched ahead, after an update of some of every owner's rows."""
    setting, cases = outcomes
    for name, ranks in cases.items():
        now = torch.empty(setting.total, WIDTH)
        for rank, outcome in enumerate(ranks):
            now[list(setting.owned(rank))] = outcome.own_rows
        for rank, outcome in enumerate(ranks):
            assert torch.equal(outcome.renewed, now[setting.asked(name, rank)]), name


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_ranks_own_all_rows_in_even_ranges(setting: Setting) -> None:
    ranges = [owned_range(setting.total, rank, setting.ranks, setting.ranks_per_host) for rank in range(setting.ranks)]
    assert sorted(ranges) == list(pairwise(split_bounds(setting.total, setting.ranks)))


def test_two_levels_send_a_hosts_common_rows_once() -> None:
    """Every rank asks for all rows: across hosts goes what one rank of a host wants, not what both want."""
    flat, two_level = Setting(4, 11), Setting(4, 11, ranks_per_host=2)
    network_bytes = [
        sum(result["everything"].network_bytes for result in run_ranks(4, exchanged, setting))
        for setting in (flat, two_level)
    ]
    hosts = [[0, 1], [2, 3]]
    foreign = sum(len(two_level.owned(owner)) for host in hosts for owner in range(4) if owner not in host)
    assert network_bytes[1] == 4 * 8 + foreign * (8 + 12 + 12)
    assert network_bytes[1] < network_bytes[0] / 2


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
