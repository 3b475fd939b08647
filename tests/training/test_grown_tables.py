"""A grown model in training: the losses of the formula; rows that are frozen, and their state, keep every bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.checkpoint.growing import grow
from overtok_megatron.checkpoint.store import find_checkpoint
from overtok_megatron.checkpoint.weights_only import write_weights
from overtok_megatron.config.growth import grow_config, parse_tables
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.ngram.building import row_space
from overtok_megatron.ngram.row_store import initial_rows
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.resuming import load_weights
from support.assembling import cpu_model
from support.distributed_harness import run_ranks
from support.layouts import BATCH, CPU, EOD, SEQ, VOCAB, Layout, layout_config, own_tokens
from support.reference import Reference

STEPS = 6
NEW = [parse_tables("orders=2-4,slices=2,rows=151"), parse_tables("order=2,rows=7")]


def batches() -> Tensor:
    """[steps, G, s + 1]."""
    return torch.randint(0, 12, (STEPS, BATCH, SEQ + 1), generator=torch.Generator().manual_seed(5)) * 3 % VOCAB


def initial(config: RunConfig) -> Tensor:
    """A model's initial rows."""
    space = row_space(config.model, config.over_encoding)
    return initial_rows(0, space.total_rows, space.width, config.over_encoding.init_std, config.training.seed)


def write_grown(folder: Path, config: RunConfig) -> RunConfig:
    """A checkpoint of the initial model below folder/old and the grown one below folder/new; the configuration of that."""
    dense = cpu_model(config).named_parameters()
    rows = [(0, {"weight": initial(config)})]
    write_weights(folder / "old", config, dense, rows, eod_id=EOD, tokenizer_fingerprint="own")
    grown = grow_config(config, NEW, freeze=True)
    grow(find_checkpoint(folder / "old"), folder / "new", grown, lambda key: "test")
    return grown


def train_grown(folder: Path, config: RunConfig) -> tuple[list[float], list[float], bool]:
    """One rank's work: losses, norms, and whether a row that should has moved."""
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    load_weights(engine, find_checkpoint(folder / "new"))
    tables = engine.tables
    assert tables is not None
    before = {name: column.clone() for name, column in tables.columns().items()}
    parts = [own_tokens(engine, batch) for batch in batches()]
    results = []
    engine.announce(parts[0])
    for step, part in enumerate(parts):
        if step + 1 < STEPS:
            engine.announce(parts[step + 1])
        results.append(engine.step(part, 3e-3))
    space, shard = tables.family.space, tables.store
    trained = space.is_trained(torch.arange(shard.start, shard.stop))
    assert 0 < int(trained.sum()) < len(trained)
    for name, column in tables.columns().items():
        assert torch.equal(column[~trained], before[name][~trained]), name
    moved = bool((tables.columns()["weight"] != before["weight"])[trained].any())
    return [result.loss for result in results], [result.grad_norm for result in results], moved


DECAY = {"table_rows": 997, "weight_decay": 0.3, "init_std": 0.5, "combine": "scaled"}


@pytest.mark.parametrize(
    ("ranks", "over", "parallel"),
    [
        (1, {"optimizer": "adam"}, {}),
        (2, {"storage": "host", "ranks_per_host": 2}, {}),
        (2, {"optimizer": "adam"}, {"tensor_parallel_size": 2}),
    ],
)
def test_only_new_rows_learn_and_losses_are_the_formulas(
    ranks: int, over: dict[str, Any], parallel: dict[str, Any], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    config = layout_config(Layout(parallel, over=DECAY | over))
    grown = write_grown(tmp_path, config)
    reference = Reference(grown, EOD)
    old = row_space(config.model, config.over_encoding)
    for table, rows in enumerate(reference.tables):
        start = initial(config)[old.row_ids_of_table(table)] if table < old.num_tables else torch.zeros_like(rows)
        rows.data.copy_(start)
    expected = [reference.step(batch) for batch in batches()]
    results = run_ranks(ranks, train_grown, tmp_path, grown)
    assert any(moved for *_, moved in results)
    for losses, norms, _ in results:
        assert losses == pytest.approx(expected, rel=1e-5)
        assert norms == pytest.approx(reference.norms, rel=1e-4)
