"""Over-decoding in training: weights of 0, bfloat16, checkpoints, samples at the end of the data, and what a run reports."""

import json
import math
import re
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overtok_megatron.checkpoint.changes import check_same_state
from overtok_megatron.checkpoint.layout import CheckpointLayout
from overtok_megatron.checkpoint.store import Manifest
from overtok_megatron.cli import main
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.errors import CheckpointError
from overtok_megatron.inference.loading import load_trained
from overtok_megatron.training.step_result import StepResult
from support.config_faults import make
from support.distributed_harness import run_ranks
from support.expect_error import command_error
from support.later_losses import OD2, OD3
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
from support.layout_matrix import train_rank as train_matrix_rank
from support.layouts import (
    BATCH,
    CPU,
    EOD,
    SEQ,
    TIED,
    WITHIN,
    Layout,
    layout,
    own_tokens,
    reference_run,
    stream,
)
from support.trained_runs import TrainedRuns

HALF = {"precision": "bf16"}
NO_WEIGHT = {"over_decoding": OD3["over_decoding"] | {"loss_weights": [0.0, 0.0]}}


ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "no ZeRO": ("", {}),
    "ZeRO 1, tied": ("z1", {"model": TIED}),
    "recomputation": ("z2", {"training": {"recompute": "full"}}),
    "no clipping": ("", {"optimizer": {"gradient_clipping": 0.0}}),
}
TOGETHER = {"TP2+SP": "tp2 sp", "PP2, ZeRO 1": "pp2 z1", "CP2": "cp2", "DP2, ZeRO 3": "z3"}


def check_pairs_of(names: list[str], results: list[list[StepResult]], relative: float) -> None:
    check_main_losses(names, results, relative)
    for without, with_heads in zip(results[::2], results[1::2], strict=True):
        assert all(step.auxiliary_losses == {} for step in without)
        for step in with_heads:
            assert step.auxiliary_losses.keys() == {"over_decoding_2", "over_decoding_3"}
            assert all(math.isfinite(loss) and 1.0 < loss < 9.0 for loss in step.auxiliary_losses.values())


def test_heads_of_weight_0_leave_the_main_losses_bit_for_bit() -> None:
    """In one process, where no sum runs over ranks."""
    (results,) = run_ranks(1, train_rank, with_and_without([*ALONE.values()], NO_WEIGHT), timeout=200)
    check_pairs_of(list(ALONE), results, relative=0.0)


@pytest.mark.ci
def test_heads_of_weight_0_leave_the_main_losses_on_layouts() -> None:
    shorts: list[tuple[str, dict[str, Any]]] = [(short, {}) for short in TOGETHER.values()]
    for results in run_ranks(2, train_rank, with_and_without(shorts, NO_WEIGHT), timeout=200):
        check_pairs_of(list(TOGETHER), results, relative=1e-6)


BF16 = {
    "TP2+SP, ZeRO 1": layout("tp2 sp z1", micro=6, training=HALF, sections=OD3),
    "PP2, ZeRO 1, tied": layout("pp2 z1", model=TIED, training=HALF, sections=OD3),
    "CP2, ZeRO 2": layout("cp2 z2", micro=6, training=HALF, sections=OD2),
    "DP2, ZeRO 3, recomputation": layout("z3", training=HALF | {"recompute": "full"}, sections=OD3),
}


@pytest.mark.ci
def test_bfloat16_follows_one_process_in_float32() -> None:
    """Main losses to 0.4%, those of the tables to 0.4%, joint norms to 5%, as without heads: test_layout_matrix.py."""
    ranks = run_ranks(2, train_matrix_rank, list(BF16.values()), timeout=200)
    for index, (name, case) in enumerate(BF16.items()):
        losses, reference = reference_run(case)
        for rank in ranks:
            assert rank[index].losses == pytest.approx(losses, rel=4e-3), name
            for found, wanted in zip(rank[index].later, reference.later, strict=True):
                assert found == pytest.approx(wanted, rel=4e-3), name
            assert rank[index].norms == pytest.approx(reference.norms, rel=5e-2), name


RESUMED = {
    1: {"one process": layout("z1", micro=6, sections=OD3)},
    2: {
        "TP2+SP, ZeRO 1": layout("tp2 sp z1", micro=6, sections=OD3),
        "PP2, ZeRO 1, tied": layout("pp2 z1", micro=6, model=TIED, sections=OD3),
        "DP2, ZeRO 3": layout("z3", sections=OD2),
    },
}


@pytest.mark.parametrize("world", RESUMED)
def test_a_run_resumes_bit_for_bit(world: int, tmp_path: Path) -> None:
    check_resumed(run_ranks(world, stop_and_go_on, RESUMED[world], tmp_path, timeout=200))


PAIRS: dict[str, tuple[int, Layout]] = {
    "single, no ZeRO": (1, layout("", micro=6, sections=OD3)),
    "DP2, ZeRO 3": (2, layout("z3", sections=OD3)),
    "TP2xPP2+SP, ZeRO 1": (4, layout("tp2 pp2 sp z1", micro=3, sections=OD3)),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoints_go_on_in_another_layout(tmp_path: Path) -> None:
    check_pairs(PAIRS, list(permutations(PAIRS, 2)), tmp_path)
    check_universal(tmp_path / "TP2xPP2+SP, ZeRO 1", tmp_path / "universal")


@pytest.mark.parametrize(("short", "data"), [("z1", {}), ("z1", WITHIN), ("pp2", {}), ("cp2", WITHIN)])
def test_the_last_samples_of_the_data_lack_further_tokens(short: str, data: dict[str, Any], tmp_path: Path) -> None:
    """A set of just four samples: the last position of the last one has a next token, and none behind that."""
    tokens = write_four_samples(tmp_path / "set")
    assert len(tokens) == 4 * SEQ + 1
    training = {"micro_batch_size": 2, "global_batch_size": 4}
    case = layout(short, data=data, training=training, sections=OD3)
    ranks = run_ranks(2, step_on_a_set, case, tmp_path / "set")

    counts = []
    for ahead in (2, 3):
        counts.append(sum(not data or EOD not in tokens[t : t + ahead] for t in range(len(tokens) - ahead)))
    assert [sum(own) for own in zip(*(own for _, own in ranks), strict=True)] == counts
    if short == "z1":
        assert ranks[0][1] != ranks[1][1]  # one of them has the end
    check_four_samples(case, tmp_path / "set", [result for result, _ in ranks])


def test_a_table_that_scores_nothing_reports_no_loss() -> None:
    """Documents of two tokens: no token of a document is two behind another. The objective stays finite."""
    case = layout("", micro=BATCH, data=WITHIN, sections=OD3)
    (result,) = run_ranks(1, short_documents, case)
    assert result.auxiliary_losses == {}
    assert math.isfinite(result.loss) and math.isfinite(result.grad_norm)


def short_documents(case: Layout) -> StepResult:
    engine = start(case)
    tokens = torch.arange(SEQ + 3).remainder(2).mul(EOD - 7).add(7).expand(BATCH, -1)
    return engine.step(own_tokens(engine, tokens), 3e-3)


def loss_of_one_table() -> tuple[bool, bool, list[int], dict[str, bool]]:
    """One rank's work: whether main loss and weights are as before a step in which table 3 alone has a NaN; the blame."""
    engine = start(layout("", micro=4, training={"non_finite": "skip"}, sections=OD3))
    table = engine.model.get_parameter("over_decoding.tables.3.weight")
    with torch.no_grad():
        table[5] = math.nan
    before = {name: weight.clone() for name, weight in engine.dense_weights().items()}
    result = engine.step(own_tokens(engine, stream(2)[0]), 3e-3)
    same = all(
        torch.equal(weight.nan_to_num(), before[name].nan_to_num()) for name, weight in engine.dense_weights().items()
    )
    finite = {name: math.isfinite(loss) for name, loss in result.auxiliary_losses.items()}
    return math.isfinite(result.loss), same, engine.non_finite_micro_batches, finite


def test_a_loss_of_a_table_that_is_not_finite_leaves_the_step_out() -> None:
    finite = {"over_decoding_2": True, "over_decoding_3": False}
    assert run_ranks(1, loss_of_one_table) == [(True, True, [0, 1, 2], finite)]


@pytest.fixture(scope="module")
def run_with_tables(trained_runs: TrainedRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("over-decoding") / "run"
    run_ranks(1, train_run, trained_runs.folder, folder, OD3)
    return folder


def test_a_run_reports_its_tables(trained_runs: TrainedRuns, run_with_tables: Path) -> None:
    records = [json.loads(line) for line in (run_with_tables / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert {name for name in record if name.startswith("loss/")} == {"loss/over_decoding_2", "loss/over_decoding_3"}
        assert 3.0 < record["loss/over_decoding_2"] < 9.0
    assert [record["step"] for record in records if "validation/loss" in record] == [2, 4]
    plain = json.loads((trained_runs.run("fp32") / "metrics.jsonl").read_text().splitlines()[0])
    assert not [name for name in plain if name.startswith("loss/")]


def test_a_model_with_tables_is_loaded_and_grown(
    run_with_tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_trained(run_with_tables, CPU).model
    assert trained.over_decoding is not None
    assert list(trained.over_decoding.tables) == ["2", "3"]
    words = ["grow", str(run_with_tables), "--output", str(tmp_path / "grown"), "--tables", "orders=2,rows=1305"]
    assert main(words) == 0
    grown = load_trained(tmp_path / "grown", CPU).model
    for name, weight in trained.named_parameters():
        assert torch.equal(weight, grown.get_parameter(name)), name
    words[3] = str(tmp_path / "other")
    refused = command_error(capsys, *words, "over_decoding.num_tokens=2", "over_decoding.loss_weights=[0.1]")
    assert "over_decoding.num_tokens: 2; the model has 3" in refused


def test_an_export_leaves_the_tables_out_and_says_so(
    run_with_tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run_with_tables), "--output", str(tmp_path / "there")]) == 0
    said = "left out (over_decoding_2, over_decoding_3)"
    assert said in capsys.readouterr().out and said in (tmp_path / "there" / "README.md").read_text()
    names = {name for path in (tmp_path / "there").glob("model*.safetensors") for name in load_file(path)}
    assert "lm_head.weight" in names
    assert not [name for name in names if "over_decoding" in name]


def manifest_of(config: RunConfig, *without: str) -> Manifest:
    values = config.model_dump(mode="json")
    for section in without:
        del values[section]
    layout_ = CheckpointLayout(zero_stage=0)
    return Manifest(
        step=1, consumed_samples=1, config=values, layout=layout_, eod_id=0, tokenizer_fingerprint="none", files={}
    )


def test_what_may_change_when_a_run_goes_on() -> None:
    """Weights of losses; not what another model has. A checkpoint that is older than the sections has no heads."""
    with_heads, without = make(**tables(3, [0.1, 0.2], 4)), make()
    for section in ("over_decoding", "multi_token_prediction"):
        check_same_state(without.model_dump(mode="json"), manifest_of(without, section), Path("old"))
    other_rank_of_none = make(**tables(1, [0.1], 8))
    check_same_state(other_rank_of_none.model_dump(mode="json"), manifest_of(without), Path("old"))
    other_weights = make(**tables(3, [0.0, 0.7], 4))
    check_same_state(other_weights.model_dump(mode="json"), manifest_of(with_heads), Path("old"))
    for changed, key in (
        (make(**tables(2, [0.1], 4)), "over_decoding.num_tokens is 3 there and 2 in this run"),
        (make(**tables(3, [0.1, 0.2], None)), "over_decoding.low_rank is 4 there and null in this run"),
        (make(multi_token_prediction__depth=1, **tables(3, [0.1, 0.2], 4)), "multi_token_prediction.depth is 0 there"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(key)):
            check_same_state(changed.model_dump(mode="json"), manifest_of(with_heads), Path("old"))
    with pytest.raises(CheckpointError, match=r"over_decoding\.num_tokens is 1 there and 3 in this run"):
        check_same_state(with_heads.model_dump(mode="json"), manifest_of(without, "over_decoding"), Path("old"))


def tables(num_tokens: int, weights: list[float], low_rank: int | None) -> dict[str, Any]:
    values = {"num_tokens": num_tokens, "loss_weights": weights, "low_rank": low_rank}
    return {f"over_decoding__{key}": value for key, value in values.items()}
