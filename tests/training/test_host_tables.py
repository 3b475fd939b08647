"""Tables in host memory, their rows fetched a step ahead: the numbers of tables beside the model, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import BATCH, CPU, EOD, SEQ, VOCAB, Layout, layout_config, own_tokens

STORED = {"optimizer": "rowwise_adagrad", "row_dtype": "bfloat16", "state_dtype": "bfloat16", "combine": "scaled"}
GROWN = {"added": [{"orders": [4, 2], "table_rows": 61}, {"orders": [2], "table_rows": 43, "frozen": True}]}


def batches(steps: int) -> list[Tensor]:
    """[G, s + 1] each, whose n-grams come back from step to step."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 8, (BATCH, SEQ + 1), generator=generator) * 3 % VOCAB for _ in range(steps)]


def train(
    over: dict[str, Any], parallel: dict[str, Any], steps: int, rate: float, ahead: bool = True
) -> tuple[list[float], list[float], Tensor, Tensor]:
    """One rank's work: losses, validation losses on the way, and its rows and their state in the end.

    ahead: steps are announced before they come.
    """
    config = layout_config(Layout({"zero_stage": 1, **parallel}, over=STORED | GROWN | over))
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    parts = [own_tokens(engine, batch) for batch in batches(steps)]
    losses, validations = [], []
    announced = parts if ahead else []
    for part in announced[:1]:
        engine.announce(part)
    for step, part in enumerate(parts):
        for following in announced[step + 1 : step + 2]:
            engine.announce(following)
        losses.append(engine.step(part, rate).loss)
        if step % 70 == 3:
            pair = (part.flatten(0, 1)[:, :-1], part.flatten(0, 1)[:, 1:])
            validations.append(engine.evaluate([pair])[0])
    assert engine.tables is not None
    prefetch = engine.tables.prefetch
    assert (prefetch is not None and prefetch.updates_rows) == (over.get("storage") == "host")
    columns = engine.tables.columns()
    return losses, validations, columns["weight"], columns["square_sum"]


TENSOR = {"tensor_parallel_size": 2, "sequence_parallel": True}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "parallel", "steps"),
    [
        pytest.param(1, {}, 100, marks=pytest.mark.ci),
        (2, {}, 50),
        pytest.param(4, TENSOR, 12, marks=pytest.mark.ci),
        *(pytest.param(n, p, 200, marks=SLOW) for n, p in ((1, {}), (2, {}), (4, TENSOR))),
    ],
)
def test_rows_fetched_ahead_change_nothing(ranks: int, parallel: dict[str, Any], steps: int) -> None:
    device = run_ranks(ranks, train, {}, parallel, steps, 1e-2, timeout=230)
    host = run_ranks(ranks, train, {"storage": "host"}, parallel, steps, 1e-2, timeout=230)
    assert_same(host, device)
    assert device[0][0][-1] < 0.95 * device[0][0][0]


HOST_IN_LEVELS = {"storage": "host", "ranks_per_host": 2}


def train_both_ways(over: list[dict[str, Any]]) -> list[list[Any]]:
    """One rank's work: for each setting the results of steps that were announced, and of steps that were not."""
    return [[train(one, {}, 6, 1e-2, ahead) for ahead in (True, False)] for one in over]


def test_steps_that_nobody_announced_are_the_same() -> None:
    for settings in zip(*run_ranks(2, train_both_ways, [{}, {"storage": "host"}, HOST_IN_LEVELS]), strict=True):
        for ahead, at_once in settings:
            assert_same([ahead], [at_once])


def assert_same(found: list[Any], wanted: list[Any]) -> None:
    """Results of `train` on all ranks, bit for bit."""
    for (losses, validations, *columns), (wanted_losses, wanted_validations, *wanted_columns) in zip(
        found, wanted, strict=True
    ):
        assert losses == wanted_losses
        assert validations == wanted_validations
        assert all(torch.equal(a, b) for a, b in zip(columns, wanted_columns, strict=True))


@pytest.mark.ci
def test_two_levels_give_the_flat_numbers() -> None:
    exact = {"row_dtype": "float32", "state_dtype": "float32"}
    flat = run_ranks(4, train, exact, TENSOR, 10, 1e-3)
    levels = run_ranks(4, train, {**exact, "ranks_per_host": 2, "storage": "host"}, TENSOR, 10, 1e-3)
    assert levels[0][0] == pytest.approx(flat[0][0], rel=1e-5)
    # owners are ordered by (rank within the host, host): ranks 1 and 2 are exchanged
    for mine, theirs in zip((0, 1, 2, 3), (0, 2, 1, 3), strict=True):
        torch.testing.assert_close(levels[mine][2], flat[theirs][2], rtol=1e-3, atol=1e-5)
