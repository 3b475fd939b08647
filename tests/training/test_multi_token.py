"""Multi-token prediction in training: weights of 0, checkpoints, rows ahead of their step, the end of the data, reports."""

import json
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from overtok_megatron.inference.loading import load_trained
from overtok_megatron.training.step_result import StepResult
from support.distributed_harness import run_ranks
from support.later_losses import OD3
from support.later_runs import (
    check_four_samples,
    check_main_losses,
    check_resumed,
    step_on_a_set,
    stop_and_go_on,
    train_rank,
    train_run,
    with_and_without,
    write_four_samples,
)
from support.layout_changes import check_pairs, check_universal, start
from support.layouts import (
    CPU,
    OLMOE,
    SEQ,
    TIED,
    WITHIN,
    Layout,
    experts,
    layout,
    own_tokens,
    stream,
)
from support.trained_runs import TrainedRuns

D1 = {"multi_token_prediction": {"depth": 1, "loss_weight": 0.3}}
D2 = {"multi_token_prediction": {"depth": 2, "loss_weight": 0.5}}
NO_WEIGHT = {"multi_token_prediction": {"depth": 2, "loss_weight": 0.0}}
NAMES = ["multi_token_1", "multi_token_2"]


ALONE: dict[str, dict[str, Any]] = {
    "": {},
    "z1": {"model": TIED, "over": {"optimizer": "rowwise_adagrad"}},
    "z2": {"training": {"recompute": "full"}, "data": WITHIN},
    "z3": {"model": OLMOE},
}
TOGETHER: dict[str, dict[str, Any]] = {"tp2 sp": {}, "tp2": {}, "pp2 z1": {"model": TIED}, "cp2": {}, "z3": {}}


def check_pairs_of(names: list[str], results: list[list[StepResult]], relative: float) -> None:
    check_main_losses(names, results, relative)
    for name, with_heads in zip(names, results[1::2], strict=True):
        for step in with_heads:
            found = [step.auxiliary_losses[head] for head in NAMES]
            assert all(math.isfinite(loss) and 1.0 < loss < 9.0 for loss in found), name


def test_heads_of_weight_0_leave_the_main_losses_bit_for_bit() -> None:
    """In one process, where no sum runs over ranks; also with experts, whose routers would move the main model."""
    (results,) = run_ranks(1, train_rank, with_and_without([*ALONE.items()], NO_WEIGHT), timeout=200)
    check_pairs_of(list(ALONE), results, relative=0.0)


@pytest.mark.ci
def test_heads_of_weight_0_leave_the_main_losses_on_layouts() -> None:
    for results in run_ranks(2, train_rank, with_and_without([*TOGETHER.items()], NO_WEIGHT), timeout=200):
        check_pairs_of(list(TOGETHER), results, relative=1e-6)


RESUMED = {
    1: {"one process": layout("z1", micro=6, sections=D2)},
    2: {
        "TP2+SP, ZeRO 1": layout("tp2 sp z1", micro=6, sections=D2),
        "PP2, ZeRO 1": layout("pp2 z1", micro=6, sections=D2 | OD3),
        "PP2, ZeRO 1, tied": layout("pp2 z1", micro=6, model=TIED, sections=D1),
        "DP2, ZeRO 3, host tables": layout("z3", over={"storage": "host"}, sections=D2),
    },
}


@pytest.mark.parametrize("world", RESUMED)
def test_a_run_resumes_bit_for_bit(world: int, tmp_path: Path) -> None:
    check_resumed(run_ranks(world, stop_and_go_on, RESUMED[world], tmp_path, timeout=200))


PAIRS: dict[str, tuple[int, Layout]] = {
    "single, no ZeRO": (1, layout("", micro=6, sections=D2)),
    "DP2, ZeRO 3": (2, layout("z3", sections=D2)),
    "TP2xPP2+SP, ZeRO 1": (4, layout("tp2 pp2 sp z1", micro=3, sections=D2)),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoints_go_on_in_another_layout(tmp_path: Path) -> None:
    check_pairs(PAIRS, list(permutations(PAIRS, 2)), tmp_path)
    check_universal(tmp_path / "TP2xPP2+SP, ZeRO 1", tmp_path / "universal")


AHEAD = {"PP2": layout("pp2", sections=D2), "TP2+SP": layout("tp2 sp", micro=6, sections=D2)}


def train_ahead(case: Layout) -> tuple[list[StepResult], list[StepResult]]:
    """One rank's work: the same steps, each announced before the one before it, or not at all."""
    results = []
    for announced in (True, False):
        engine = start(case)
        batches = [own_tokens(engine, batch) for batch in stream(2)[:4]]
        steps = []
        if announced:
            engine.announce(batches[0])
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            if announced and following is not None:
                engine.announce(following)
            steps.append(engine.step(batch, 3e-3))
        results.append(steps)
    return results[0], results[1]


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("name", AHEAD)
def test_rows_of_further_tokens_may_be_announced(name: str, storage: str) -> None:
    case = AHEAD[name]
    with_storage = Layout(case.parallel, over={"storage": storage}, training=case.training, sections=case.sections)
    for ahead, at_once in run_ranks(2, train_ahead, with_storage):
        assert ahead == at_once


def one_step(cases: list[Layout]) -> list[StepResult]:
    """One rank's work: the first step of each case."""
    return [steps[0] for steps in train_rank(cases)]


def test_a_stage_looks_up_what_it_reads() -> None:
    """Look-ups of 4 tables: the first stage those of its inputs, the last one those of D more tokens behind each slice too."""
    positions, sequences, num_tables = SEQ, 12, 4
    wanted = {
        "pp2": num_tables * sequences * (positions + positions + 2),
        "tp2": num_tables * sequences * (positions + 2 * 2),
        "tp2 sp": num_tables * sequences * (positions + 2 * 2),
        "cp2": num_tables * sequences * (positions + 2 * 2),
        "z1": num_tables * sequences * (positions + 2),
    }
    for results in run_ranks(2, one_step, [layout(short, micro=6, sections=D2) for short in wanted]):
        assert [step.looked_up_rows for step in results] == [*wanted.values()]


@pytest.mark.parametrize(("short", "data"), [("z1", {}), ("pp2", WITHIN), ("tp2 sp", {})])
def test_the_last_samples_of_the_data_lack_further_tokens(short: str, data: dict[str, Any], tmp_path: Path) -> None:
    """A set of just four samples: after the last target of the last one there is no token that a depth could read."""
    write_four_samples(tmp_path / "set")
    case = layout(short, data=data, training={"micro_batch_size": 2, "global_batch_size": 4}, sections=D2)
    ranks = run_ranks(2, step_on_a_set, case, tmp_path / "set")
    check_four_samples(case, tmp_path / "set", [result for result, _ in ranks])


def test_routers_of_the_depths_are_trained_and_not_reported() -> None:
    """The loss that routers report, and their metrics, are those of the main layers: equal in the first step with heads."""
    with_heads, without = run_ranks(1, one_step, [experts("", sections=D2), experts("")])[0]
    assert with_heads.auxiliary_losses["router"] == pytest.approx(without.auxiliary_losses["router"], rel=1e-6)
    assert with_heads.router_metrics == pytest.approx(without.router_metrics, rel=1e-6)


def test_a_run_reports_its_depths_and_its_model_is_read(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    run_ranks(1, train_run, trained_runs.folder, tmp_path / "run", D2)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert {name for name in record if name.startswith("loss/")} == {f"loss/{name}" for name in NAMES}
        assert 3.0 < record["loss/multi_token_2"] < 9.0
    assert [record["step"] for record in records if "validation/loss" in record] == [2, 4]
    model = load_trained(tmp_path / "run", CPU).model
    assert model.multi_token is not None and model.multi_token.depth == 2
