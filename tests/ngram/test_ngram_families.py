"""A second family of tables, of another width and with another hash, beside the first: on one rank and on two."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.ngram.building import build_family_tables, build_tables, family_seed
from overtok_megatron.ngram.families import Readout
from overtok_megatron.ngram.ids import MISSING
from overtok_megatron.ngram.row_space import RowFilter
from overtok_megatron.ngram.row_store import initial_rows
from overtok_megatron.parallel.grid import GridShape, ProcessGrid
from support.distributed_harness import run_ranks

CPU = torch.device("cpu")
SEED, STD, RATE, VOCAB = 3, 0.1, 0.5, 50
OTHER_SEED = family_seed(SEED, "made up")


@dataclass(frozen=True)
class MadeUpFamily:
    """One table of 97 rows of 2-grams, of which every third row is frozen."""

    width: int = 5
    total_rows: int = 97
    orders: tuple[int, ...] = (2,)
    history_length: int = 1
    seed_name: str = "made up"
    readout: Readout = "embedding"

    @property
    def trained_rows(self) -> RowFilter:
        return lambda row_ids: row_ids % 3 != 0

    def row_ids(self, tokens: Tensor, history: Tensor | None = None) -> Tensor:
        if history is None:
            history = torch.full((*tokens.shape[:-1], 1), MISSING)
        before = torch.cat([history, tokens], dim=-1)[..., :-1]
        return ((tokens * 31 + before + 1) % self.total_rows).unsqueeze(-1)

    def with_kernels(self, kernels: RowKernels) -> "MadeUpFamily":
        return self

    def collision_share(self, tokens: Tensor) -> float:
        raise NotImplementedError


def configuration() -> RunConfig:
    over = {"enabled": True, "ngram_order": 3, "num_slices": 1, "table_rows": 61, "row_width": 4, "init_std": STD,
            "optimizer": "sgd", "row_dtype": "float32", "gradient_dtype": "float32"}  # fmt: skip
    return RunConfig.model_validate({
        "model": {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_attention_heads": 1},
        "over_encoding": over,
        "tokenizer": {"path": "none"},
        "data": {"train": "none", "seq_length": 6},
        "optimizer": {"learning_rate": 1.0},
        "training": {"output_directory": "none", "micro_batch_size": 3, "global_batch_size": 12, "train_iters": 1,
                     "precision": "fp32", "seed": SEED},
    })  # fmt: skip


def tokens_of(ranks: int) -> Tensor:
    """[ranks, micro-batches, b, s]."""
    return torch.randint(0, VOCAB, (ranks, 2, 3, 6), generator=torch.Generator().manual_seed(0))


def trained_step(ranks: int) -> list[dict[str, Any]]:
    """Of each family on one rank: the rows looked up before and after a step of gradients of one, and the rows owned."""
    dist.init_process_group("gloo")
    grid = ProcessGrid.create(GridShape(data=ranks))
    tokens, kernels = tokens_of(ranks)[grid.rank], choose_kernels("auto", CPU)
    settings: dict[str, Any] = {"device": CPU, "kernels": kernels, "group": grid.table_group}
    families = [
        build_tables(configuration(), 0, **settings),
        build_family_tables(configuration(), MadeUpFamily(), **settings),
    ]
    results = []
    for tables in families:
        fetched = tables.fetch_rows(tokens, training=True)
        before = [fetched[number].gather() for number in range(len(tokens))]
        for rows in before:
            rows.sum().backward()
        tables.update_rows(tables.reduce_gradients(fetched, 1.0), RATE, 1.0)
        results.append(
            {
                "before": torch.stack(before).detach(),
                "after": tables.fetch_rows(tokens).gather(),
                "owned": (tables.store.start, tables.store.rows.weight),
                "bytes": tables.payload_bytes(fetched),
            }
        )
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_families_learn_beside_each_other(ranks: int) -> None:
    tokens = tokens_of(ranks)
    results = run_ranks(ranks, trained_step, ranks)
    first = build_tables(configuration(), 0, device=CPU, kernels=choose_kernels("auto", CPU)).family
    for number, family in enumerate((first, MadeUpFamily())):
        row_ids = family.row_ids(tokens)  # [ranks, micro-batches, b, s, T]
        start = initial_rows(0, family.total_rows, family.width, STD, SEED if number == 0 else OTHER_SEED)
        uses = torch.bincount(row_ids.flatten(), minlength=family.total_rows)
        if family.trained_rows is not None:
            uses = uses * family.trained_rows(torch.arange(family.total_rows))
        expected = start - RATE * uses.unsqueeze(1)
        assert 0 < int((uses > 0).sum()) < family.total_rows
        for rank, result in enumerate(results):
            own = result[number]
            assert torch.equal(own["before"], start[row_ids[rank]])
            assert torch.equal(own["after"], expected[row_ids[rank]])
            begin, rows = own["owned"]
            assert torch.equal(rows, expected[begin : begin + len(rows)])
            assert (own["bytes"] > 0) == (ranks > 1)


def test_families_do_not_share_random_numbers() -> None:
    """The first family keeps the run's seed; others differ from it and from each other, in all bits that key the noise too."""
    assert family_seed(SEED, "") == SEED
    seeds = [family_seed(seed, name) for seed in (SEED, SEED + 1) for name in ("", "one", "two")]
    assert len(set(seeds)) == len({seed % 2**32 for seed in seeds}) == 6
    first, second = (initial_rows(0, 5, 4, STD, family_seed(SEED, name)) for name in ("", "made up"))
    assert not (first == second).any()


def test_a_familys_row_ids_may_come_in_pieces() -> None:
    """What decoding asks of a family: a piece with the tokens before it as history gives the ids of the whole."""
    tokens, family = tokens_of(1)[0, 0], MadeUpFamily()
    whole = family.row_ids(tokens)
    piece = family.row_ids(tokens[:, 4:], tokens[:, 4 - family.history_length : 4])
    assert torch.equal(piece, whole[:, 4:])
