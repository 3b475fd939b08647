"""Row ids of n-grams against loops over Python's integers; history, padding and splits change nothing."""

from collections import defaultdict
from typing import Literal

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.rows import STRIPES
from overtok_megatron.ngram.ids import MISSING, NgramHash
from overtok_megatron.ngram.row_space import RowSpace, TableGroup
from support.reference import python_ngram_row, python_row_id

EOD = 2
SIZES = st.sampled_from([1, 7, 1009, 12_800_000, 2**31 - 64])


@st.composite
def hashes(draw: st.DrawFn) -> tuple[NgramHash, int]:
    """A hash and its vocabulary."""
    vocab = draw(st.sampled_from([3, 50, 32_000, 100_278]))
    orders = st.lists(st.integers(2, 5), min_size=1, max_size=2, unique=True).map(tuple)
    added = draw(st.lists(st.builds(TableGroup, orders, st.integers(1, 2), SIZES), max_size=2))
    space = RowSpace(
        ngram_order=draw(st.integers(2, 5)),
        num_slices=draw(st.integers(1, 4)),
        table_rows=draw(SIZES),
        width=8,
        added=tuple(added),
    )
    base = draw(st.sampled_from([vocab, 2, 10**9 + 7]))
    kernels = choose_kernels(draw(st.sampled_from(["auto", "torch"])), torch.device("cpu")).rows
    boundary: Literal["reset", "ignore"] = draw(st.sampled_from(["reset", "ignore"]))
    pad_id = draw(st.integers(0, 2))
    return NgramHash(space=space, base=base, pad_id=pad_id, boundary=boundary, eod_id=EOD, kernels=kernels), vocab


def tokens_of(vocab: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (2, size), generator=generator)
    return torch.where(torch.rand(tokens.shape, generator=generator) < 0.2, EOD, tokens)


@settings(max_examples=150, deadline=None)
@given(pair=hashes(), size=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_rows_are_the_formula(pair: tuple[NgramHash, int], size: int, seed: int) -> None:
    ngram_hash, vocab = pair
    tokens = tokens_of(vocab, size, seed)
    space = ngram_hash.space
    result = ngram_hash.row_ids(tokens)
    groups = [(range(2, space.ngram_order + 1), space.num_slices, space.table_rows)]
    groups += [(group.orders, group.num_slices, group.table_rows) for group in space.added]
    kinds = []  # of each table: its order and its rows
    for orders, slices, first in groups:
        own = [order for order in orders for _ in range(slices)]
        kinds += [(order, first + 2 * number) for number, order in enumerate(own)]
    assert space.num_tables == len(kinds)
    for line, row in enumerate(tokens.tolist()):
        for t in range(size):
            for table, (order, rows) in enumerate(kinds):
                reset = ngram_hash.boundary == "reset"
                wanted = python_ngram_row(row, t, order, ngram_hash.base, rows, ngram_hash.pad_id, EOD, reset)
                row_id = python_row_id(table, wanted, [rows for _, rows in kinds], STRIPES)
                assert result[line, t, table] == row_id
                assert [int(part) for part in space.table_and_row_of(torch.tensor(row_id))] == [table, wanted]


@settings(max_examples=60, deadline=None)
@given(pair=hashes(), cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_pieces_with_history_give_the_whole(pair: tuple[NgramHash, int], cuts: list[int], seed: int) -> None:
    ngram_hash, vocab = pair
    tokens = tokens_of(vocab, sum(cuts), seed)
    reach = ngram_hash.history_length
    history = torch.full((2, reach), MISSING)
    pieces = []
    for piece in tokens.split(cuts, dim=1):
        pieces.append(ngram_hash.row_ids(piece, history))
        history = torch.cat([history, piece], dim=1)[:, -reach:]
    assert (torch.cat(pieces, dim=1) == ngram_hash.row_ids(tokens)).all()


@settings(max_examples=60, deadline=None)
@given(pair=hashes(), padding=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_left_padding_changes_nothing(pair: tuple[NgramHash, int], padding: int, seed: int) -> None:
    ngram_hash, vocab = pair
    tokens = tokens_of(vocab, 6, seed)
    padded = torch.cat([torch.full((2, padding), MISSING), tokens], dim=1)
    assert (ngram_hash.row_ids(padded)[:, padding:] == ngram_hash.row_ids(tokens)).all()


def test_collision_share_counts_lookups() -> None:
    space = RowSpace(ngram_order=3, num_slices=2, table_rows=31, width=4, added=(TableGroup((2,), 1, 13),))
    ngram_hash = NgramHash(space=space, base=50, pad_id=0, boundary="ignore", eod_id=EOD)
    tokens = torch.randint(0, 6, (1, 60), generator=torch.Generator().manual_seed(0))
    rows = ngram_hash.row_ids(tokens)[0]
    windows = torch.stack(ngram_hash.windows(tokens), dim=-1)[0]
    shared = total = 0
    for table, order in enumerate((2, 2, 3, 3, 2)):
        users = defaultdict(set)
        grams = [tuple(window[:order].tolist()) for window in windows]
        for row, gram in zip(rows[:, table].tolist(), grams, strict=True):
            users[row].add(gram)
        shared += sum(len(users[row]) > 1 for row in rows[:, table].tolist())
        total += 60
    assert 0 < shared < total
    assert ngram_hash.collision_share(tokens) == shared / total
