"""Heads for later tokens trained alone: the main model and its rows keep their bits, on every layout, and over a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.checkpoint.store import CheckpointStore
from overtok_megatron.checkpoint.weights_only import read_dense_weights
from overtok_megatron.config.counts import bytes_per_rank, flops_per_token
from overtok_megatron.config.derived import is_trained
from overtok_megatron.config.validation import validate
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.reshaping import reshape
from overtok_megatron.training.resuming import load_checkpoint, load_weights
from overtok_megatron.training.saving import Saver
from support.distributed_harness import run_ranks
from support.later_losses import OD2
from support.layout_changes import start
from support.layouts import CPU, EOD, TIED, Layout, experts, layout, layout_config, own_tokens, stream

STEPS, SAVED_AT = 6, 3
HEADS = {"multi_token_prediction": {"depth": 2, "loss_weight": 0.5}} | OD2
NAMES = ["multi_token_1", "multi_token_2", "over_decoding_2"]


def alone(short: str, **others: Any) -> Layout:
    training = {"train_only": "heads", **others.pop("training", {})}
    return layout(short, micro=6, training=training, sections=HEADS, optimizer={"eps": 1e-6}, **others)


@dataclass(frozen=True)
class RankResult:
    main: list[float]
    later: list[list[float]]
    norms: list[float]
    moved: set[str]
    moved_rows: int


def train(cases: list[Layout]) -> list[RankResult]:
    """One rank's work: the first batch, every step anew."""
    results = []
    for case in cases:
        config = layout_config(case)
        grid = start_processes(config, CPU)
        validate(config, grid.shape.world_size, lambda key: "test")
        engine = TrainingEngine(config, grid, CPU, EOD)
        before = {name: weight.clone() for name, weight in engine.dense_weights().items()}
        rows = None if engine.tables is None else engine.tables.store.rows.weight.clone()
        batch = own_tokens(engine, stream(2)[0])
        engine.announce(batch)
        steps = []
        for step in range(STEPS):
            if step + 1 < STEPS:
                engine.announce(batch)
            steps.append(engine.step(batch, 3e-3))
        moved = {name for name, weight in engine.dense_weights().items() if not torch.equal(weight, before[name])}
        moved_rows = 0
        if engine.tables is not None:
            engine.tables.settle()
            moved_rows = int((engine.tables.store.rows.weight != rows).sum())
        results.append(
            RankResult(
                [step.loss for step in steps],
                [[step.auxiliary_losses[name] for name in NAMES] for step in steps],
                [step.grad_norm for step in steps],
                moved,
                moved_rows,
            )
        )
    return results


LAYOUTS: dict[str, Layout] = {
    "TP2+SP": alone("tp2 sp"),
    "TP2, tied": alone("tp2 z1", model=TIED),
    "CP2, ZeRO 2": alone("cp2 z2"),
    "DP2": alone(""),
    "DP2, ZeRO 3, recomputation": alone("z3", training={"recompute": "full"}),
}
MORE: dict[str, Layout] = {
    "DP2, ZeRO 1": alone("z1"),
    "DP2, ZeRO 2, tied, offload": alone("z2 offload", model=TIED),
    "DP2, ZeRO 1, host tables": alone("z1", over={"storage": "host"}),
    "DP2, ZeRO 2, compiled kernels": alone("z2", training={"kernels": "auto"}),
}
HALF: dict[str, Layout] = {
    f"bf16, ZeRO {stage}": alone(f"z{stage}", training={"precision": "bf16"}) for stage in (1, 2, 3)
}


def check(ranks: list[list[RankResult]], cases: dict[str, Layout]) -> None:
    references = run_ranks(1, train, [alone(""), alone("", model=TIED)])[0]
    for result in references:
        assert len(set(result.main)) == 1  # the same batch, and a model that does not move
        for first, last in zip(result.later[0], result.later[-1], strict=True):
            assert last < first - 0.05
    for rank in ranks:
        for (name, case), result in zip(cases.items(), rank, strict=True):
            reference = references[bool(case.model)]
            relative = 4e-3 if name.startswith("bf16") else 1e-5
            assert result.main == pytest.approx(reference.main, rel=relative), name
            assert len(set(result.main)) == 1, name
            for found, wanted in zip(result.later, reference.later, strict=True):
                assert found == pytest.approx(wanted, rel=relative), name
            assert result.norms == pytest.approx(reference.norms, rel=2e-2 if name.startswith("bf16") else 1e-4), name
            assert result.moved and all(is_trained("heads", parameter) for parameter in result.moved), name
            assert result.moved_rows == 0, name


@pytest.mark.parametrize(
    "cases",
    [LAYOUTS, *(pytest.param(cases, marks=pytest.mark.slow) for cases in (MORE, HALF))],
    ids=["some", "more", "bf16"],
)
def test_heads_are_trained_as_in_one_process_and_nothing_else_moves(cases: dict[str, Layout]) -> None:
    check(run_ranks(2, train, list(cases.values()), timeout=200), cases)


def plain(short: str, **others: Any) -> Layout:
    return layout(short, micro=6, sections=HEADS, **others)


def save(case: Layout, folder: Path) -> None:
    """One rank's work: a run that trains everything, and one from its weights that trains heads alone, with checkpoints."""
    engine = start(plain(""))
    batches = [own_tokens(engine, batch) for batch in stream(2)[:STEPS]]
    engine.step(batches[0], 3e-3)
    write(engine, folder / "all", 1)
    path = CheckpointStore(folder / "all").latest()
    assert path is not None
    engine = start(case)
    load_weights(engine, path)
    batches = [own_tokens(engine, batch) for batch in stream(2)[:STEPS]]
    for batch in batches[:SAVED_AT]:
        engine.step(batch, 3e-3)
    write(engine, folder / "heads", SAVED_AT)


def write(engine: TrainingEngine, folder: Path, step: int) -> None:
    saver = Saver(engine, CheckpointStore(folder), eod_id=EOD, tokenizer_fingerprint="none")
    saver.save(step, 0)
    saver.finish()


def go_on(cases: list[Layout], folder: Path) -> list[list[list[float]]]:
    """One rank's work: the last steps from the checkpoint, on every layout."""
    results = []
    for case in cases:
        engine = start(case)
        path = CheckpointStore(folder).latest()
        assert path is not None
        load_checkpoint(engine, path)
        batches = [own_tokens(engine, batch) for batch in stream(2)[SAVED_AT:STEPS]]
        steps = [engine.step(batch, 3e-3) for batch in batches]
        results.append([[step.loss, step.grad_norm, *step.auxiliary_losses.values()] for step in steps])
    return results


@pytest.mark.ci
@pytest.mark.parametrize("zero_stage", [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1))])
def test_a_run_goes_on_on_its_own_layout_and_on_others(zero_stage: int, tmp_path: Path) -> None:
    """From DeepSpeed's files, from the same by parameter on another layout, and from what reshape makes of them."""
    run_ranks(1, save, alone(f"z{zero_stage}"), tmp_path)
    folder = tmp_path / "heads"
    own, *others = run_ranks(1, go_on, [alone(f"z{zero_stage}"), alone("z2"), alone("z3")], folder)[0]
    for other in others:
        assert other == [pytest.approx(values, rel=1e-5) for values in own]
    for rank in run_ranks(2, go_on, [alone("z3"), alone("tp2 sp z1")], folder):
        for other in rank:
            assert other == [pytest.approx(values, rel=1e-5) for values in own]
    path = CheckpointStore(folder).latest()
    assert path is not None
    reshaped = reshape(path, tmp_path / "reshaped")
    (from_reshaped,) = run_ranks(1, go_on, [alone("z1")], tmp_path / "reshaped")[0]
    assert from_reshaped == [pytest.approx(values, rel=1e-5) for values in own]
    weights = [weights_of(source) for source in (tmp_path / "all", folder)]
    assert reshaped.is_dir() and weights_of(tmp_path / "reshaped").keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]) != is_trained("heads", name) or weight.ndim == 1, name


def weights_of(run: Path) -> dict[str, Tensor]:
    from overtok_megatron.checkpoint.store import read_manifest

    path = CheckpointStore(run).latest()
    assert path is not None
    return dict(read_dense_weights(path, read_manifest(path)))


def test_counts_of_a_frozen_model() -> None:
    """Gradients and optimizer state of the heads alone, and a forward pass of the main model."""
    every, heads = (layout_config(case) for case in (experts("", sections=HEADS), experts("", sections=HEADS)))
    heads = heads.model_copy(update={"training": heads.training.model_copy(update={"train_only": "heads"})})
    size, whole = bytes_per_rank(heads, 1), bytes_per_rank(every, 1)
    assert size.weights == whole.weights
    assert size.optimizer == 2 * size.gradients < whole.optimizer / 2
    main = layout_config(experts(""))
    without_heads = flops_per_token(every) - flops_per_token(main)
    shared = 2 * 2.0 * heads.model.vocab_size * heads.model.hidden_size  # no gradient of the head's weight
    encoders = 2 * 4.0 * heads.model.hidden_size * 48
    wanted = flops_per_token(main) / 3 + without_heads - shared - encoders
    assert flops_per_token(heads) == pytest.approx(wanted)
