"""Copies of the embedding's dense parts on the last of two stages, used by a head made up here, against one process.

The head adds a loss: half the squared distance between the last hidden states and a multiple of what parts of the embedding
give for the same positions. So the last stage looks up rows as well, and both stages have gradients of projections and rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from overtok_megatron.config import derived
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.assembly import build_run_layers
from overtok_megatron.model.embedding import EmbeddingPart, InputEmbedding
from overtok_megatron.model.heads import ForwardResult, LaterTokens
from overtok_megatron.model.transformer import Stage, Transformer
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.parallel.splits import is_tied_copy
from overtok_megatron.training import engine as engine_module
from overtok_megatron.training.deepspeed.pipeline_stage import PipelineStage
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.micro_batch import MicroBatch
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, TIED, Layout, layout, layout_config, own_tokens, stream

STEPS = 3
SCALE = 16.0  # large enough for the last stage's gradients to show in the joint norm
BOTH: tuple[EmbeddingPart, ...] = ("word", "over_encoding")
BF16 = {"precision": "bf16"}


@dataclass(frozen=True)
class Case:
    """shared: of which parts the last stage holds copies. used: those that the added loss uses."""

    layout: Layout
    shared: tuple[EmbeddingPart, ...]
    used: tuple[EmbeddingPart, ...]


CASES = {
    "both": Case(layout("pp2"), BOTH, BOTH),
    "both, tied head, ZeRO 1": Case(layout("pp2 z1", model=TIED), BOTH, BOTH),
    "n-grams alone": Case(layout("pp2"), ("over_encoding",), ("over_encoding",)),
    "n-grams without a gradient": Case(layout("pp2"), BOTH, ("word",)),
    "bf16, n-grams without a gradient": Case(layout("pp2", training=BF16), BOTH, ("word",)),
    "bf16, ZeRO 1, n-grams without a gradient": Case(layout("pp2 z1", training=BF16), BOTH, ("word",)),
}


def with_added_loss(
    result: ForwardResult,
    hidden: Tensor,
    embedding: InputEmbedding,
    tokens: Tensor,
    fetched: FetchedRows | None,
    used: tuple[EmbeddingPart, ...],
) -> ForwardResult:
    parts: dict[str, Callable[[], Tensor]] = {
        "word": lambda: embedding.word(tokens),  # type: ignore[misc]  # this stage has it
        "over_encoding": lambda: embedding.over_encoding(fetched),  # type: ignore[misc]
    }
    wanted = sum(parts[part]() for part in used)
    return result._replace(objective=result.objective + 0.5 * (hidden - SCALE * wanted).float().square().sum())


class AddedLossTransformer(Transformer):
    used: tuple[EmbeddingPart, ...] = ()

    def forward(
        self,
        tokens: Tensor,
        fetched: FetchedRows | None,
        targets: Tensor,
        *,
        full_tokens: Tensor | None = None,
        later: LaterTokens | None = None,
    ) -> ForwardResult:
        hidden, routing = self.hidden(tokens, fetched, full_tokens=full_tokens)
        result = self.head.forward_losses(hidden, targets, routing=routing)
        return with_added_loss(result, hidden, self.embedding, tokens, fetched, self.used)


class AddedLossStage(PipelineStage):
    used: tuple[EmbeddingPart, ...] = ()

    def forward_losses(self, hidden: Tensor, batch: MicroBatch, routing: Any, documents: Any) -> ForwardResult:
        result = super().forward_losses(hidden, batch, routing, documents)
        return with_added_loss(result, hidden, self.embedding, batch.inputs, batch.fetched, self.used)


def build_added_loss(
    case: Case, config: RunConfig, grid: ProcessGrid, *, device: torch.device, kernels: Kernels, eod_id: int
) -> AddedLossTransformer | AddedLossStage:
    """In place of `training.building.build_model`."""
    counts = derived.blocks_per_stage(config)
    stage = Stage.of(grid.coordinate("pipe"), counts)
    layers = build_run_layers(config, device=device, kernels=kernels, stage=stage, shared=case.shared)
    model: AddedLossTransformer | AddedLossStage
    if grid.shape.pipe == 1:
        model = AddedLossTransformer(layers)
    else:
        micro_batches = derived.accumulation_steps(config, grid.shape.world_size)
        model = AddedLossStage(
            layers, counts, grid, z_loss_weight=0.0, num_micro_batches=micro_batches, sequence_parallel=False
        )
    model.used = case.used
    return model


class LookingUpEngine(TrainingEngine):
    """An engine whose last stage looks up n-grams as well."""

    @property
    def looks_up_rows(self) -> bool:
        return True


@dataclass(frozen=True)
class RankResult:
    losses: list[float]
    norms: list[tuple[float, float]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    replicas: set[str]
    rows: Tensor


def train_rank(cases: list[Case]) -> list[RankResult]:
    results = []
    for case in cases:
        config = layout_config(case.layout)
        with patch.object(engine_module, "build_model", partial(build_added_loss, case)):
            engine = LookingUpEngine(config, start_processes(config, CPU), CPU, EOD)
        named = dict(engine.model.named_parameters())
        gradients: dict[str, Tensor] = {}
        optimizer = engine.deepspeed_engine.optimizer
        if isinstance(optimizer, torch.optim.Optimizer):  # float32 without ZeRO: clipped gradients as they are
            optimizer.register_step_pre_hook(
                lambda *_, named=named, gradients=gradients: gradients.update(
                    {name: weight.grad.clone() for name, weight in named.items()}
                )
            )
        steps = [engine.step(own_tokens(engine, batch), 3e-3) for batch in stream()[:STEPS]]
        assert engine.tables is not None
        results.append(
            RankResult(
                [step.loss for step in steps],
                [(step.grad_norm, step.table_grad_norm) for step in steps],
                gradients,
                {name: weight.detach().clone() for name, weight in named.items()},
                {name for name, weight in named.items() if is_tied_copy(weight)},
                engine.tables.store.rows.weight.clone(),
            )
        )
    return results


def in_one_process(case: Case) -> Case:
    """The same model and losses without a pipeline, in float32."""
    return Case(Layout({}, model=case.layout.model, training={"micro_batch_size": 2}), (), case.used)


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[RankResult, RankResult, RankResult]]:
    """By case: one process, the first stage, the last stage."""
    references = {str(case): case for case in map(in_one_process, CASES.values())}  # several cases share one
    (found,) = run_ranks(1, train_rank, list(references.values()), timeout=300)
    alone = dict(zip(references, found, strict=True))
    first, last = run_ranks(2, train_rank, list(CASES.values()), timeout=300)
    return {
        name: (alone[str(in_one_process(case))], *stages)
        for (name, case), stages in zip(CASES.items(), zip(first, last, strict=True), strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_two_stages_equal_one_process(results: dict[str, tuple[RankResult, RankResult, RankResult]], name: str) -> None:
    alone, *stages = results[name]
    half = name.startswith("bf16")
    for stage in stages:
        assert stage.losses == pytest.approx(alone.losses, rel=4e-3 if half else 1e-5)
        for found, wanted in zip(stage.norms, alone.norms, strict=True):
            assert found == pytest.approx(wanted, rel=5e-2 if half else 1e-4)
        assert stage.weights.keys() <= alone.weights.keys()
        if half:
            continue
        for parameter, gradient in stage.gradients.items():
            wanted = alone.gradients[parameter]
            assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), parameter
        for parameter, weight in stage.weights.items():
            wanted = alone.weights[parameter]
            assert (weight - wanted).norm() <= 1e-4 * wanted.norm(), parameter
    if not half:
        rows = torch.cat([stage.rows for stage in stages])
        assert (rows - alone.rows).norm() <= 1e-5 * alone.rows.norm()


@pytest.mark.parametrize("name", CASES)
def test_copies_stay_equal_and_are_replicas_on_the_last_stage_only(
    results: dict[str, tuple[RankResult, RankResult, RankResult]], name: str
) -> None:
    alone, first, last = results[name]
    copies = {
        parameter for parameter in alone.weights for part in CASES[name].shared if f"embedding.{part}." in parameter
    }
    assert copies
    assert first.weights.keys() & last.weights.keys() == copies
    assert first.weights.keys() | last.weights.keys() == alone.weights.keys()
    assert (first.replicas, last.replicas) == (set(), copies)
    for parameter in copies:
        assert torch.equal(first.weights[parameter], last.weights[parameter]), parameter


def test_the_added_loss_reaches_projections_and_rows(
    results: dict[str, tuple[RankResult, RankResult, RankResult]],
) -> None:
    """Otherwise the comparison above would show nothing of the copies."""
    used, unused = results["both"][0], results["n-grams without a gradient"][0]
    projection = "embedding.over_encoding.projection"
    norm = unused.gradients[projection].norm()
    assert (used.gradients[projection] - unused.gradients[projection]).norm() > 0.01 * norm
    assert used.norms[0][1] != pytest.approx(unused.norms[0][1], rel=1e-3)  # ten times the tolerance above
