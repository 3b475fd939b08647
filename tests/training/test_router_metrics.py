"""Metrics of experts' routers: the formula on transformers' router logits, and the same on every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.config.schema import ModelConfig, RunConfig
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.training.deepspeed.joint_norm import StepNorms
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.micro_batch import StageResults
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.step_result import RowCounts, StepReduction, StepResult
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, MANY, OLMOE, Layout, experts, layout_config, own_tokens, stream
from support.reference import Reference
from support.trained_runs import TrainedRuns, tiny_run_config

STEPS = 5
NO_Z = {"router_z_loss_weight": 0.0}
UNEVEN = {"pipeline_parallel_size": 2, "pipeline_partition": [0, 4], "zero_stage": 1}
LAYOUTS = {
    1: {
        "one process": experts(""),
        "recomputation": experts("z1", training={"recompute": "full"}),
        "many experts, no z-loss": experts("", micro=12, model=MANY | NO_Z),
    },
    2: {
        "TP2": experts("tp2"),
        "TP2+SP": experts("tp2 sp z1"),
        "CP2": experts("cp2"),
        "DP2, ZeRO 3, recomputation": experts("z3", training={"recompute": "full"}),
        "PP2": experts("pp2 z1"),
        "PP2, recomputation": experts("pp2", training={"recompute": "full"}),
        "PP2, embedding alone": Layout(UNEVEN, model=OLMOE, training={"micro_batch_size": 2}, optimizer={"eps": 1e-3}),
        "TP2+SP, many experts, no z-loss": experts("tp2 sp", micro=12, model=MANY | NO_Z),
        "PP2, many experts, no z-loss": experts("pp2", micro=12, model=MANY | NO_Z),
    },
    4: {
        "TP2xPP2+SP": experts("tp2 pp2 sp z1"),
        "TP2xCP2+SP": experts("tp2 cp2 sp z1"),
        "PP2xCP2": experts("pp2 cp2 z1"),
        "PP4": experts("pp4"),
    },
}


def train_rank(cases: dict[str, Layout]) -> dict[str, list[StepResult]]:
    """One rank's work: the steps of each case."""
    results: dict[str, list[StepResult]] = {}
    for name, case in cases.items():
        config = layout_config(case)
        engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
        results[name] = []
        for batch in stream()[:STEPS]:
            results[name].append(engine.step(own_tokens(engine, batch), 3e-3))
            tokens = own_tokens(engine, batch)
            pair = None if tokens is None else (tokens.flatten(0, 1)[:, :-1], tokens.flatten(0, 1)[:, 1:])
            engine.evaluate([pair])  # is in no step's metrics
    return results


class Recorder(Reference):
    """Keeps the router logits [G s, E] of each layer of each step."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, EOD)
        self.logits: list[list[Tensor]] = []

    def router_loss(self, logits: Any, batch_size: int) -> Tensor:
        self.logits.append([layer.detach().double() for layer in logits])
        return super().router_loss(logits, batch_size)


def by_formula(layers: list[Tensor], model: ModelConfig, micro_batches: int) -> dict[str, float]:
    """Of one step, from logits [G s, E] of each layer: loops and counts, as arXiv 2409.02060 writes them."""
    assert model.num_experts is not None and model.num_experts_per_token is not None
    balance, z, loads = [], [], []
    for logits in layers:
        for part in logits.chunk(micro_batches):
            probabilities = part.exp() / part.exp().sum(1, keepdim=True)
            total = 0.0
            chosen = probabilities.sort(dim=1, descending=True).indices[:, : model.num_experts_per_token]
            for expert in range(model.num_experts):
                share = (chosen == expert).sum().item() / chosen.numel()
                total += share * probabilities[:, expert].mean().item()
            balance.append(model.num_experts * total)
            z.append(part.exp().sum(1).log().square().mean().item())
        chosen = logits.sort(dim=1, descending=True).indices[:, : model.num_experts_per_token]
        loads += [
            (chosen == expert).sum().item() / (chosen.numel() / model.num_experts)
            for expert in range(model.num_experts)
        ]
    metrics = {"balance_loss": sum(balance) / len(balance), "max_load": max(loads)}
    return metrics | ({"z_loss": sum(z) / len(z)} if model.router_z_loss_weight else {})


@pytest.fixture(scope="module")
def expected() -> dict[tuple[bool, int], list[dict[str, float]]]:
    """By (with many experts, micro-batch): the formula's metrics, which depend on nothing else of a layout."""
    torch.set_num_threads(1)
    results = {}
    for many, case in ((False, experts("")), (True, experts("", micro=12, model=MANY | NO_Z))):
        config = layout_config(case)
        reference = Recorder(config)
        for batch in stream()[:STEPS]:
            reference.step(batch)
        size = config.training.micro_batch_size
        micro_batches = config.training.global_batch_size // size
        results[many, size] = [by_formula(step, config.model, micro_batches) for step in reference.logits]
    return results


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_metrics_are_the_formulas_on_every_layout(
    world: int, expected: dict[tuple[bool, int], list[dict[str, float]]]
) -> None:
    ranks = run_ranks(world, train_rank, LAYOUTS[world], timeout=200)
    for name, case in LAYOUTS[world].items():
        config = layout_config(case)
        wanted = expected[config.model.num_experts == 40, config.training.micro_batch_size]
        for rank in ranks:
            assert rank[name] == ranks[0][name], name
        for step, (found, metrics) in enumerate(zip(ranks[0][name], wanted, strict=True)):
            assert found.router_metrics == pytest.approx(metrics, rel=1e-5), (name, step)
            assert found.router_metrics["max_load"] > 1.0
            # the router's term of the objective: its two parts, weighted
            term = config.model.router_aux_loss_weight * metrics["balance_loss"]
            term += config.model.router_z_loss_weight * metrics.get("z_loss", 0.0)
            assert found.auxiliary_losses == {"router": pytest.approx(term, rel=1e-5)}, (name, step)


def train_run(folder: Path, output: Path, model: dict[str, Any]) -> None:
    """One rank's work: a run with a mixture, on two stages."""
    from overtok_megatron.training.trainer import Trainer

    values = tiny_run_config(folder, "bf16").model_dump(mode="json")
    values["model"] |= model
    values["parallel"]["pipeline_parallel_size"] = 2
    values["training"] |= {"output_directory": str(output), "train_iters": 2, "micro_batch_size": 4}
    output.mkdir(exist_ok=True)
    assert Trainer(RunConfig.model_validate(values), device=CPU, num_threads=1).run()


def test_a_run_reports_them(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    model = {"num_experts": 4, "num_experts_per_token": 2, "router_z_loss_weight": 1e-3}
    run_ranks(2, train_run, trained_runs.folder, tmp_path / "run", model)
    names = {"router/balance_loss", "router/z_loss", "router/max_load"}
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert {name for name in record if name.startswith("router/")} == names
        assert 1.0 <= record["router/max_load"] <= 2.0  # two of four experts for each token
        assert 0.9 < record["router/balance_loss"] < 2.0
    dense = (trained_runs.run("bf16") / "metrics.jsonl").read_text()
    assert "router/" not in dense


def test_a_loss_that_the_first_step_did_not_have_is_an_error() -> None:
    """Its name is not among those that the ranks agreed on, so it would be missing from every report."""
    reduction = StepReduction(layout_config(Layout({})), ProcessGrid.single(), CPU)
    norms = StepNorms(1.0, 0.0, 1.0, None)
    for names in (["router"], [], ["router"]):
        results = StageResults([torch.ones(())], [], [dict.fromkeys(names, torch.ones(()))])
        assert reduction.reduce(results, RowCounts(), norms, stop_asked=False).auxiliary_losses.keys() == {"router"}
    results = StageResults([torch.ones(())], [], [{"later": torch.ones(())}])
    with pytest.raises(AssertionError, match="later"):
        reduction.reduce(results, RowCounts(), norms, stop_asked=False)
