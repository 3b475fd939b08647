"""The tokens of steps come in order, read ahead on a thread, each announced one step before it is trained on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.batches import Tokens, TrainBatches
from overtok_megatron.data.run_data import open_run_data
from overtok_megatron.errors import DataError
from overtok_megatron.parallel.devices import CPU
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.training.processes import start_processes
from overtok_megatron.training.token_feed import TokenFeed
from support.distributed_harness import run_ranks
from support.trained_runs import TrainedRuns, tiny_run_config

CONSUMED, STEPS = 16, 5


def made_feed(config: RunConfig, grid: ProcessGrid) -> TokenFeed:
    return TokenFeed(config, open_run_data(config), grid, CPU, num_micro_batches=1, extra_tokens=1)


@contextmanager
def feed_of(config: RunConfig, grid: ProcessGrid | None = None) -> Iterator[TokenFeed]:
    feed = made_feed(config, grid or ProcessGrid.single())
    yield feed
    feed.finish()


def test_tokens_are_announced_one_step_ahead(trained_runs: TrainedRuns) -> None:
    config = tiny_run_config(trained_runs.folder, "fp32")
    with feed_of(config) as feed:
        announced: list[Tensor] = []
        steps = feed.steps(CONSUMED, STEPS, announced.append)
        assert not announced
        for done in range(STEPS):
            tokens = next(steps)
            assert len(announced) == min(done + 2, STEPS)
            assert torch.equal(tokens, announced[done])
            assert list(tokens.shape) == [1, config.training.micro_batch_size, config.data.seq_length + 1]
        assert next(steps, None) is None
        later = next(feed.steps(CONSUMED + config.training.global_batch_size, 1, announced.append))
        assert torch.equal(later, announced[1])
        assert list(feed.steps(CONSUMED, 0, announced.append)) == []


def test_a_thread_reads_one_step_further(trained_runs: TrainedRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[str] = []
    read = TrainBatches.read

    def watched(self: TrainBatches, first: int) -> Tokens:
        readers.append(threading.current_thread().name)
        return read(self, first)

    monkeypatch.setattr(TrainBatches, "read", watched)
    with feed_of(tiny_run_config(trained_runs.folder, "fp32")) as feed:
        next(feed.steps(CONSUMED, STEPS, lambda tokens: None))
    assert len(readers) == 3  # the step given, the one announced, and one more
    assert all(name.startswith("tokens") for name in readers)


def test_an_error_of_the_thread_is_raised_where_tokens_are_asked_for(
    trained_runs: TrainedRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = TrainBatches.read

    def broken(self: TrainBatches, first: int) -> Tokens:
        reads.append(first)
        if len(reads) == 3:
            raise DataError("broken")
        return read(self, first)

    monkeypatch.setattr(TrainBatches, "read", broken)
    config = tiny_run_config(trained_runs.folder, "fp32")
    feed = made_feed(config, ProcessGrid.single())
    steps = feed.steps(CONSUMED, STEPS, lambda tokens: None)
    next(steps)
    with pytest.raises(DataError, match="broken"):
        next(steps)
    (dataset,) = open_run_data(config).validation.values()
    # Nothing is read behind it: other ranks would take it for what is missing.
    with pytest.raises(DataError, match="broken"):
        next(feed.validation(dataset))
    with pytest.raises(DataError, match="broken"):
        feed.finish()
    assert len(reads) == 3


def fed(folder: Path, parallel: dict[str, int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """One rank's work: the tokens of three of five steps, a validation set in between; then, as a resumed run, of the rest."""
    values: dict[str, Any] = tiny_run_config(folder, "fp32").model_dump(mode="json") | {"parallel": parallel}
    config = RunConfig.model_validate(values)
    grid = start_processes(config, CPU) if parallel else ProcessGrid.single()
    announced: list[Tensor] = []
    given: list[Tensor] = []
    with feed_of(config, grid) as feed:
        if grid.rank != grid.batch_source:
            feed._batches.read = None  # type: ignore[assignment, method-assign]  # one rank reads
        steps = feed.steps(CONSUMED, STEPS, announced.append)
        given += [next(steps), next(steps)]
        (dataset,) = open_run_data(config).validation.values()
        held_out = [tensor.clone() for pair in feed.validation(dataset) for tensor in pair]
        given.append(next(steps))
    assert len(announced) == 4
    with feed_of(config, grid) as feed:
        given += feed.steps(CONSUMED + 3 * config.training.global_batch_size, STEPS - 3, announced.append)
    return given, held_out, announced


def test_every_rank_of_a_copy_has_the_same_tokens(trained_runs: TrainedRuns) -> None:
    expected = fed(trained_runs.folder, {})
    for found in run_ranks(2, fed, trained_runs.folder, {"tensor_parallel_size": 2}):
        for own, alone in zip(found, expected, strict=True):
            assert len(own) == len(alone) > 0
            assert all(torch.equal(*pair) for pair in zip(own, alone, strict=True))
