"""training.non_finite: skip: a step with a NaN leaves no trace, bit for bit, whatever class DeepSpeed's optimizer has."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.blending import BlendOrder, WeightedDataset
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.errors import DivergedError
from overtok_megatron.training.engine import TrainingEngine
from overtok_megatron.training.processes import start_processes
from support.distributed_harness import run_ranks
from support.layouts import CPU, EOD, SEQ, Layout, layout, layout_config, own_tokens, stream
from support.trained_runs import CONTEXT, TrainedRuns, tiny_run_config
from support.workspace import records

HALF = {"precision": "bf16"}
SKIP = {"non_finite": "skip"}
ADAM = {"over": {"optimizer": "adam", "table_rows": 997}}
HOST = {"over": ADAM["over"] | {"storage": "host"}}
WITHOUT = {"over": {"enabled": False}}


def skipping(short: str, *, half: bool = False, **others: Any) -> Layout:
    return layout(short, training=SKIP | (HALF if half else {}), **{**ADAM, **others})


CASES = {
    "float32, no ZeRO": skipping(""),
    "bfloat16, no ZeRO": skipping("", half=True),
    "bfloat16, ZeRO 2": skipping("z2", half=True),
    "bfloat16, ZeRO 3": skipping("z3", half=True),
    "offload, bfloat16, ZeRO 1": skipping("z1 offload", half=True),
    "pipeline, bfloat16, ZeRO 1, host tables": skipping("pp2 z1", half=True, **HOST),
}
MORE = {
    "bfloat16, ZeRO 1": skipping("z1", half=True),
    **{f"float32, ZeRO {stage}": skipping(f"z{stage}") for stage in (1, 3)},
    "pipeline, float32": skipping("pp2"),
    "pipeline, bfloat16": skipping("pp2", half=True),
    "tensor, bfloat16, ZeRO 1": skipping("tp2 z1 sp", half=True),
    **{f"offload, bfloat16, ZeRO {stage}": skipping(f"z{stage} offload", half=True) for stage in (2, 3)},
    **{f"offload, float32, ZeRO {stage}": skipping(f"z{stage} offload") for stage in (1, 2, 3)},
    "host tables, bfloat16, no ZeRO": skipping("", half=True, **HOST),
}
# The steps by the numbers of their batches, and those with a NaN in one sample: the very first one, and two in a row.
ORDER, BAD = [0, 1, 2, 3, 4], [0, 2, 3]
BAD_SAMPLE = 7


def everything(engine: TrainingEngine) -> list[Tensor]:
    """Dense weights, master weights and moments where they are, rows and their state."""
    found = [value.clone() for value in engine.dense_weights().values()]
    for state in engine.optimizer.state.values():
        found += [value.clone() for value in state.values() if isinstance(value, Tensor)]
    assert engine.tables is not None
    return found + [value.clone() for _, value in sorted(engine.tables.columns().items())]


def row_of_one_sample(engine: TrainingEngine, batch: Tensor) -> int:
    """A row that only the bad sample of a global batch [G, s + 1] looks up."""
    assert engine.tables is not None
    ids = engine.tables.family.row_ids(batch[:, :SEQ])
    others = torch.cat([ids[:BAD_SAMPLE], ids[BAD_SAMPLE + 1 :]])
    return next(row for row in ids[BAD_SAMPLE].flatten().tolist() if not (others == row).any())


def run(config: RunConfig, order: list[int], bad: list[int]) -> tuple[list[float], list[Tensor], list[list[int]], int]:
    """The losses of the good steps, the state at the end, bad micro-batches of this rank by step, the row optimizer's steps."""
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    assert engine.tables is not None
    store, losses, blamed = engine.tables.store, [], []
    for index in order:
        batch = stream()[index]
        row = row_of_one_sample(engine, batch) - store.start
        planted = index in bad and 0 <= row < store.num_rows
        if planted:
            engine.tables.settle()
            kept = store.rows.weight[row].clone()
            store.rows.weight[row] = math.nan
        result = engine.step(own_tokens(engine, batch), 3e-3 * (index + 1))
        assert math.isfinite(result.grad_norm) == (index not in bad), (
            config.parallel,
            config.training.precision,
            index,
        )
        if planted:
            engine.tables.settle()
            store.rows.weight[row] = kept
        if index in bad:
            blamed.append(engine.non_finite_micro_batches)
        else:
            losses.append(result.loss)
    return losses, everything(engine), blamed, engine.tables.optimizer.steps


def compare(cases: dict[str, Layout]) -> dict[str, tuple[list[list[int]], int]]:
    """One rank's work: of each layout the blamed micro-batches of this rank, and its data rank."""
    found = {}
    for name, case in cases.items():
        config = layout_config(case)
        losses, state, blamed, steps = run(config, ORDER, BAD)
        expected, wanted, _, wanted_steps = run(config, [index for index in ORDER if index not in BAD], [])
        assert losses == expected, name
        assert steps == wanted_steps, name
        assert len(state) == len(wanted), name
        assert all(torch.equal(own, other) for own, other in zip(state, wanted, strict=True)), name
        grid = start_processes(config, CPU)
        found[name] = (blamed if grid.is_last_stage else [], grid.data_rank)
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_a_skipped_step_leaves_no_trace(cases: dict[str, Layout]) -> None:
    ranks = run_ranks(2, compare, cases, timeout=350)
    for name, case in cases.items():
        parts = {"pipeline_parallel_size", "tensor_parallel_size"} & case.parallel.keys()
        replicas, micro = (1 if parts else 2), 2
        for rank in ranks:
            blamed, data_rank = rank[name]
            at, where = divmod(BAD_SAMPLE // micro, replicas)
            assert blamed in ([], [[at] if data_rank == where else []] * len(BAD)), name
        assert any(rank[name][0] for rank in ranks), name


def gradient_alone() -> tuple[bool, list[int], bool]:
    """One rank's work: whether the weights stay where a gradient of the second rank is NaN, and no loss is; the blame."""
    config = layout_config(skipping("", **WITHOUT))
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    engine.step(own_tokens(engine, stream()[0]), 3e-3)
    before = {name: value.clone() for name, value in engine.dense_weights().items()}
    parameter = next(iter(engine.model.parameters()))
    factor = math.nan if engine.grid.rank == 1 else 1.0
    hook = parameter.register_hook(lambda gradient: gradient * factor)
    result = engine.step(own_tokens(engine, stream()[1]), 3e-3)
    hook.remove()
    same = all(torch.equal(value, before[name]) for name, value in engine.dense_weights().items())
    return same, engine.non_finite_micro_batches, math.isfinite(result.loss) and not math.isfinite(result.grad_norm)


def test_a_gradient_alone() -> None:
    assert run_ranks(2, gradient_alone) == [(True, [], True)] * 2


def infinite_losses() -> list[tuple[bool, str]]:
    return [infinite_loss(skip) for skip in (True, False)]


def infinite_loss(skip: bool) -> tuple[bool, str]:
    """One rank's work: whether the weights stay where the loss is infinite and its gradient would not be."""
    config = layout_config(layout("z1", training=SKIP if skip else {}))
    engine = TrainingEngine(config, start_processes(config, CPU), CPU, EOD)
    before = {name: value.clone() for name, value in engine.dense_weights().items()}
    forward = engine._forward

    def with_infinite_loss(batch: Any) -> Any:
        result = forward(batch)
        return result._replace(objective=result.objective + math.inf) if engine.grid.rank == 0 else result

    engine._forward = with_infinite_loss  # type: ignore[method-assign]
    said = ""
    try:
        engine.step(own_tokens(engine, stream()[0]), 3e-3)
    except DivergedError as error:
        said = str(error)
    return all(torch.equal(value, before[name]) for name, value in engine.dense_weights().items()), said


def test_an_infinite_loss_with_a_finite_gradient() -> None:
    for skipped, (_, said) in run_ranks(2, infinite_losses):
        assert skipped == (True, "")
        assert "gradient norm is" in said


def whole_runs(folder: Path, scratch: Path) -> list[str]:
    """One rank's work: runs of which some steps have a NaN in the loss of one micro-batch; what ended them."""
    from overtok_megatron.training.trainer import Trainer

    ended = []
    for name, bad in (("few", {3, 5, 6}), ("many", {3, 5, 6, 7})):
        values = tiny_run_config(folder, "fp32").model_dump(mode="json")
        values["training"] |= {"output_directory": str(scratch / name), "micro_batch_size": 2, "train_iters": 8}
        values["training"] |= {"non_finite": "skip", "non_finite_limit": 3}
        values["checkpoint"]["interval"] = 4
        (scratch / name).mkdir(exist_ok=True)
        run = Trainer(RunConfig.model_validate(values), device=CPU, num_threads=1)
        step, forward, at = run.engine.step, run.engine._forward, [0, 0]  # step, micro-batch

        def counted(*arguments: Any, step: Any = step, at: list[int] = at, **others: Any) -> Any:
            at[:] = [at[0] + 1, 0]
            return step(*arguments, **others)

        def planted(batch: Any, run: Any = run, forward: Any = forward, at: list[int] = at, bad: set[int] = bad) -> Any:
            result = forward(batch)
            at[1] += 1
            if not run.engine.deepspeed_engine.training or at[0] not in bad or (run.grid.rank, at[1]) != (1, 2):
                return result
            return result._replace(main_loss=result.main_loss * math.nan, objective=result.objective * math.nan)

        run.engine.step, run.engine._forward = counted, planted  # type: ignore[method-assign]
        try:
            assert run.run()
            ended.append("")
        except DivergedError as error:
            ended.append(str(error))
    return ended


def test_a_run_counts_and_names_and_stops(trained_runs: TrainedRuns, tmp_path: Path) -> None:
    ranks = run_ranks(2, whole_runs, trained_runs.folder, tmp_path)
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == ""
    order = BlendOrder([WeightedDataset(IndexedDataset(trained_runs.folder / "train"), 1.0)], CONTEXT, 1234)
    assert "3 steps in a row, up to optimizer step 7" in ranks[0][1]
    assert [record["train/skipped_steps"] for record in records(tmp_path / "few")] == [0, 0, 1, 1, 2, 3, 3, 3]
    for name, steps in (("few", [3, 5, 6]), ("many", [3, 5, 6, 7])):
        found = [json.loads(line) for line in (tmp_path / name / "skipped.jsonl").read_text().splitlines()]
        assert [record["step"] for record in found] == steps
        for record in found:  # samples 6 and 7 of eight: the second micro-batch of the second rank
            assert record["by"] == "loss" and record["grad_norm"] in (
                "inf",
                "nan",
            )  # some of DeepSpeed's classes say inf
            starts = [order.locate(8 * (record["step"] - 1) + sample)[1] for sample in (6, 7)]
            assert record["samples"] == [{"set": "train", "index": start // CONTEXT} for start in starts]
    assert sorted(path.name for path in (tmp_path / "many" / "checkpoints").glob("step_*")) == ["step_00000004"]
