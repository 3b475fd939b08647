"""The whole comparison of layouts with one process: losses, norms, validation loss and final parameters."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from overtok_megatron.config.validation import validate
from overtok_megatron.parallel.splits import splits_of
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.assembling import cpu_model
from support.distributed_harness import run_ranks
from support.layouts import BATCH, CPU, EOD, SEQ, Layout, layout_config, own_tokens, reference_run, stream
from support.multi_token_layers import multi_token_names
from support.reference import Reference, hugging_face_names


@dataclass(frozen=True)
class RankResult:
    losses: list[float]
    later: list[dict[str, float]]
    norms: list[float]
    validation: float
    dense: dict[str, tuple[int | None, Tensor]]  # the split dimension and this rank's part
    rows: Tensor
    first_row: int


def train_rank(cases: list[Layout]) -> list[RankResult]:
    """One rank's work: every layout's steps, its validation loss, and this rank's part of the parameters."""
    results = []
    for case in cases:
        config = layout_config(case)
        grid = start_processes(config, CPU)
        validate(config, grid.shape.world_size, lambda key: "test")
        engine = TrainingEngine(config, grid, CPU, EOD)
        steps = [engine.step(own_tokens(engine, batch), 3e-3) for batch in stream(engine.extra_tokens - 1)]
        held_out = own_tokens(engine, stream(engine.extra_tokens - 1)[0].flip(0))
        both = engine.inputs_and_targets(held_out.flatten(0, 1))
        turned = both[0].flip(0), both[1].flip(0)  # the same mean, and another micro-batch for stages to tell apart
        validation, scored = engine.evaluate([both, turned])
        assert scored == 2 * BATCH * SEQ
        splits = {name: splits_of(weight) for name, weight in engine.model.named_parameters()}
        state = engine.dense_weights()
        dense = {}
        for name, weight in state.items():
            dense[name] = (splits[name][0].dim if splits[name] else None, weight.clone())
        assert engine.tables is not None
        results.append(
            RankResult(
                [step.loss for step in steps],
                [step.auxiliary_losses for step in steps],
                [step.grad_norm for step in steps],
                validation,
                dense,
                engine.tables.store.rows.weight.clone(),
                engine.tables.store.start,
            )
        )
    return results


def whole_weights(ranks: list[RankResult], tensor_ranks: int) -> dict[str, Tensor]:
    """The model's weights from all ranks: tensor-parallel neighbours' parts joined, one of every replica."""
    weights: dict[str, Tensor] = {}
    for first in range(0, len(ranks), tensor_ranks):
        for name, (dim, part) in ranks[first].dense.items():
            parts = [rank.dense[name][1] for rank in ranks[first : first + tensor_ranks]]
            weights[name] = part if dim is None else torch.cat(parts, dim=dim)
    return weights


def check_layout(name: str, case: Layout, ranks: list[RankResult]) -> None:
    """All ranks' results of one layout against the reference in one process."""
    losses, reference = reference_run(case)
    for rank, result in enumerate(ranks):
        assert result.losses == pytest.approx(losses, rel=1e-5), (name, rank)
        for found, wanted in zip(result.later, reference.later, strict=True):
            assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-5), (name, rank)
        assert result.norms == pytest.approx(reference.norms, rel=1e-4), (name, rank)
        assert result.validation == pytest.approx(ranks[0].validation, rel=1e-12), (name, rank)
    assert ranks[0].validation == pytest.approx(reference.loss(stream()[0].flip(0)), rel=1e-5), name
    rows = torch.cat([result.rows for result in sorted(ranks, key=lambda result: result.first_row)])
    assert (rows - reference.rows()).norm() <= 1e-5 * rows.norm(), name
    model = cpu_model(layout_config(case), eod_id=EOD)
    model.load_state_dict(whole_weights(ranks, case.parallel.get("tensor_parallel_size", 1)), strict=False)
    theirs = dict(reference.model.named_parameters())
    for parameter, weight in hugging_face_names(model).items():
        if parameter in theirs:
            distance = (weight - theirs[parameter]).norm() / theirs[parameter].norm()
            # Adam's first steps divide rounding noise by rounding noise where a gradient is nearly zero
            assert distance < 1e-4, (name, parameter, distance)
    theirs = dict(reference.multi_token.named_parameters())
    for parameter, weight in multi_token_names(model).items():
        if parameter in theirs:
            distance = (weight - theirs[parameter]).norm() / theirs[parameter].norm()
            assert distance < 1e-4, (name, parameter, distance)
    for parameter, head in reference.heads.items():
        distance = (model.get_parameter(parameter) - head).norm() / head.norm()
        assert distance < 1e-4, (name, parameter, distance)


def distances_of_weights(case: Layout, ranks: list[RankResult], reference: Reference) -> dict[str, float]:
    """How far each weight ends from the reference's, as a share of the way that the reference's went; heads included."""
    ways = {}
    final, initial = (cpu_model(layout_config(case), eod_id=EOD).float() for _ in range(2))
    final.load_state_dict(whole_weights(ranks, case.parallel.get("tensor_parallel_size", 1)), strict=False)
    theirs = dict(reference.model.named_parameters()) | dict(reference.multi_token.named_parameters())
    begun = hugging_face_names(initial) | multi_token_names(initial)
    for parameter, weight in (hugging_face_names(final) | multi_token_names(final)).items():
        if parameter in theirs:
            way = (theirs[parameter] - begun[parameter]).norm()
            ways[parameter] = ((weight - theirs[parameter]).norm() / way).item()
    return ways


def run_matrix(world: int, cases: dict[str, Layout], timeout: float) -> None:
    """Every layout on `world` ranks, in one start of their processes."""
    torch.set_num_threads(1)
    by_rank = run_ranks(world, train_rank, list(cases.values()), timeout=timeout)
    for index, (name, case) in enumerate(cases.items()):
        check_layout(name, case, [rank[index] for rank in by_rank])
