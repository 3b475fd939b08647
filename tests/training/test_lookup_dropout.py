"""Look-ups that training drops: the same in every layout and after a resume, and of the expected share."""

from pathlib import Path
from typing import Any

import pytest
import torch

from overtok_megatron.checkpoint.store import CheckpointStore
from overtok_megatron.kernels.rows import mix, noise_key
from overtok_megatron.ngram.dropout import LookupDropout
from overtok_megatron.training.resuming import load_checkpoint
from overtok_megatron.training.saving import Saver
from support.distributed_harness import run_ranks
from support.layout_changes import start
from support.layouts import CPU, EOD, SEQ, Layout, layout, own_tokens, stream

DROPPED = {"dropout": [0.3, 0.6], "optimizer": "rowwise_adagrad"}
_MASK = 0xFFFFFFFF


def dropout(**changed: Any) -> LookupDropout:
    settings = {"rates": (0.25, 0.5), "seed": 5, "seq_length": 8, "positions": (0, 8), "micro_batch_size": 2,
                "data_rank": 0, "data_ranks": 1, "dtype": torch.float32, "device": CPU}  # fmt: skip
    return LookupDropout(**(settings | changed))


def dropped(seed: int, step: int, sample: int, position: int, table: int, rate: float, seq_length: int) -> bool:
    """The rule, written once more with Python's integers."""
    number = sample * seq_length + position
    of_look_up = mix(mix((number & _MASK) ^ noise_key(seed, step)) ^ (number >> 32))
    return mix((of_look_up + table * 0x9E3779B9) & _MASK) < rate * 2**32


def test_factors_follow_the_rule() -> None:
    factors = dropout(data_rank=1, data_ranks=3, positions=(4, 4)).factors(7, 2)
    assert factors.shape == (2, 2, 4, 2)
    for micro_batch in range(2):
        for row in range(2):
            sample = (micro_batch * 3 + 1) * 2 + row
            for position in range(4):
                for table, rate in enumerate((0.25, 0.5)):
                    found = float(factors[micro_batch, row, position, table])
                    gone = dropped(5, 7, sample, 4 + position, table, rate, 8)
                    assert found == pytest.approx(0.0 if gone else 1 / (1 - rate))


def test_shares_and_independence() -> None:
    large = dropout(seq_length=512, positions=(0, 512), micro_batch_size=64)
    kept = (large.factors(0, 1) > 0).flatten(0, 2).double()  # [look-ups, T]
    assert kept.mean(dim=0).tolist() == pytest.approx([0.75, 0.5], abs=0.01)
    assert abs(float(torch.corrcoef(kept.T)[0, 1])) < 0.02  # tables
    in_order = kept[:, 1]
    assert abs(float(torch.corrcoef(torch.stack([in_order[1:], in_order[:-1]]))[0, 1])) < 0.02  # neighbouring positions
    other = (large.factors(1, 1) > 0).flatten(0, 2).double()
    assert abs(float(torch.corrcoef(torch.stack([in_order, other[:, 1]]))[0, 1])) < 0.02  # steps


def train(cases: list[Layout]) -> list[list[float]]:
    """One rank's work: the losses of each case."""
    losses = []
    for case in cases:
        engine = start(case)
        losses.append([engine.step(own_tokens(engine, batch), 3e-3).loss for batch in stream()[:8]])
    return losses


@pytest.mark.parametrize(
    ("ranks", "short"),
    [
        (2, ("z1", "tp2 sp", "cp2 z2", "pp2")),
        pytest.param(4, ("tp2 pp2", "tp2 cp2 z1", "z3"), marks=pytest.mark.ci),
    ],
)
def one_rank(folder: Path) -> dict[str, Any]:
    """What one rank finds: losses with and without dropout, of a resumed run, evaluations, and rows that were dropped."""
    whole, everything = train([layout("z1", over=DROPPED), layout("z1")])
    found: dict[str, Any] = {"whole": whole, "everything": everything}

    engine = start(layout("z1", over=DROPPED))
    for batch in stream()[:3]:
        engine.step(own_tokens(engine, batch), 3e-3)
    saver = Saver(engine, CheckpointStore(folder), eod_id=EOD, tokenizer_fingerprint="none")
    saver.save(3, 3 * 12)
    saver.finish()
    again = start(layout("z1", over=DROPPED))
    path = CheckpointStore(folder).latest()
    assert path is not None
    load_checkpoint(again, path)
    found["resumed"] = [again.step(own_tokens(again, batch), 3e-3).loss for batch in stream()[3:8]]

    pair = stream()[0][:, :SEQ], stream()[0][:, 1:]
    evaluated = [start(layout("", over=DROPPED | {"dropout": rate})) for rate in (0.5, 0.0)]
    found["evaluations"] = [engine.evaluate([pair]) for engine in evaluated]

    everything_dropped = start(layout("", over=DROPPED | {"dropout": 1 - 2**-32}))
    assert everything_dropped.tables is not None
    before = everything_dropped.tables.store.rows.weight.clone()
    everything_dropped.step(own_tokens(everything_dropped, stream()[0]), 3e-3)
    found["rows"] = before, everything_dropped.tables.store.rows.weight
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = run_ranks(1, one_rank, tmp_path_factory.mktemp("saved"), timeout=120)
    return found


@pytest.mark.parametrize(
    ("ranks", "short"),
    [
        (2, ("z1", "tp2 sp", "cp2 z2", "pp2")),
        pytest.param(4, ("tp2 pp2", "tp2 cp2 z1", "z3"), marks=pytest.mark.ci),
    ],
)
def test_every_layout_drops_the_same(alone: dict[str, Any], ranks: int, short: tuple[str, ...]) -> None:
    assert abs(alone["whole"][3] - alone["everything"][3]) > 1e-4  # something was dropped
    cases = [layout(one, micro=3 if one == "z3" else 2, over=DROPPED) for one in short]
    for rank in run_ranks(ranks, train, cases, timeout=120):
        for name, losses in zip(short, rank, strict=True):
            assert losses == pytest.approx(alone["whole"], rel=1e-5), name


def test_a_resumed_run_drops_what_it_would_have_dropped(alone: dict[str, Any]) -> None:
    assert alone["resumed"] == alone["whole"][3:]


def test_evaluation_drops_nothing(alone: dict[str, Any]) -> None:
    first, second = alone["evaluations"]
    assert first == second


def test_a_dropped_look_up_leaves_its_row_as_it_was(alone: dict[str, Any]) -> None:
    before, after = alone["rows"]
    assert torch.equal(before, after)
