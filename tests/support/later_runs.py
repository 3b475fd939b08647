"""Runs with heads for later tokens that tests of each kind of head make: steps, a stop and a resume, the end of the data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from overtok_megatron.checkpoint.store import CheckpointStore
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.training.resuming import load_checkpoint
from overtok_megatron.training.saving import Saver
from overtok_megatron.training.step_result import StepResult
from support.dataset_factory import train_batches, write_dataset
from support.layout_changes import start
from support.layouts import CPU, EOD, SEQ, VOCAB, Layout, layout, layout_config, own_tokens, stream
from support.reference import Reference
from support.trained_runs import tiny_run_config

STEPS = 8
_SAVED_AT, _END = 2, 5

Steps = list[StepResult]


def train_rank(cases: list[Layout]) -> list[Steps]:
    """One rank's work: the steps of each case, whose samples begin alike whatever heads there are."""
    results = []
    for case in cases:
        engine = start(case)
        results.append([engine.step(own_tokens(engine, batch), 3e-3) for batch in stream(2)[:STEPS]])
    return results


def with_and_without(
    shorts: Sequence[tuple[str, dict[str, Any]]], sections: Mapping[str, dict[str, Any]]
) -> list[Layout]:
    """Each layout without heads, and with the heads that `sections` describe."""
    return [layout(short, micro=6, sections=own, **others) for short, others in shorts for own in ({}, dict(sections))]


def check_main_losses(names: Sequence[str], results: Sequence[Steps], relative: float) -> None:
    """Of layouts as `with_and_without` orders them: the main losses are those of the model without heads."""
    for name, without, with_heads in zip(names, results[::2], results[1::2], strict=True):
        assert [step.loss for step in with_heads] == pytest.approx(
            [step.loss for step in without], rel=relative, abs=0.0
        ), name


def stop_and_go_on(cases: dict[str, Layout], folder: Path) -> dict[str, tuple[Steps, Steps]]:
    """One rank's work: the last steps of an uninterrupted run, and those of one that goes on from the checkpoint on its way."""
    results = {}
    batches = stream(2)[:_END]
    for name, case in cases.items():
        engine = start(case)
        for batch in batches[:_SAVED_AT]:
            engine.step(own_tokens(engine, batch), 3e-3)
        saver = Saver(engine, CheckpointStore(folder / name), eod_id=EOD, tokenizer_fingerprint="none")
        saver.save(_SAVED_AT, 0)
        saver.finish()
        whole = [engine.step(own_tokens(engine, batch), 3e-3) for batch in batches[_SAVED_AT:]]
        path = CheckpointStore(folder / name).latest()
        assert path is not None
        again = start(case)
        load_checkpoint(again, path)
        results[name] = whole, [again.step(own_tokens(again, batch), 3e-3) for batch in batches[_SAVED_AT:]]
    return results


def check_resumed(ranks: Sequence[dict[str, tuple[Steps, Steps]]]) -> None:
    """Of what `stop_and_go_on` gives on every rank: losses and norms are equal bit for bit."""
    for rank in ranks:
        for name, (whole, resumed) in rank.items():
            assert [(step.loss, step.grad_norm, step.auxiliary_losses) for step in resumed] == [
                (step.loss, step.grad_norm, step.auxiliary_losses) for step in whole
            ], name


def write_four_samples(prefix: Path) -> list[int]:
    """A set of just four samples, three documents; returns its tokens, of which the last is the last sample's last target."""
    generator = torch.Generator().manual_seed(1)
    documents = [[*torch.randint(4, VOCAB, (size,), generator=generator).tolist(), EOD] for size in (9, 21, 15)]
    documents[-1] += [5]
    write_dataset(prefix, documents)
    return [token for document in documents for token in document]


def step_on_a_set(case: Layout, prefix: Path) -> tuple[StepResult, list[float]]:
    """One rank's work: a step on all samples of a set, and this rank's share of the positions that its heads score."""
    engine = start(case)
    samples = train_batches(
        IndexedDataset(prefix),
        SEQ,
        engine.config.training.micro_batch_size,
        engine.num_micro_batches,
        engine.grid.data_rank,
        engine.grid.shape.data,
        seed=0,
        extra_tokens=engine.extra_tokens,
    )
    tokens = torch.from_numpy(samples.read(0))
    later = engine.later_tokens.read(tokens)
    assert later is not None
    return engine.step(tokens, 3e-3), later.own_counts.tolist()


def check_four_samples(case: Layout, prefix: Path, results: Sequence[StepResult]) -> None:
    """Every rank's step on all samples of `write_four_samples` is the reference's in one process."""
    samples = train_batches(IndexedDataset(prefix), SEQ, 4, seed=0, extra_tokens=3).read(0)
    assert samples.size == 4 * (SEQ + 3) and (samples < 0).any()
    reference = Reference(layout_config(case), EOD)
    loss = reference.step(torch.from_numpy(samples)[0])
    for result in results:
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.auxiliary_losses == pytest.approx(reference.later[0], rel=1e-5)
        assert result.grad_norm == pytest.approx(reference.norms[0], rel=1e-4)


def train_run(folder: Path, output: Path, sections: dict[str, dict[str, Any]]) -> None:
    """One rank's work: a small run with heads."""
    from overtok_megatron.training.trainer import Trainer

    values = tiny_run_config(folder, "fp32").model_dump(mode="json") | sections
    values["training"] |= {"output_directory": str(output), "train_iters": 4, "validation_interval": 2}
    output.mkdir()
    assert Trainer(RunConfig.model_validate(values), device=CPU, num_threads=1).run()
