"""The tokens of steps come in order, each announced one step before it is trained on, and none beyond the last step."""

import torch
from torch import Tensor

from overtok_megatron.data.run_data import open_run_data
from overtok_megatron.parallel.devices import CPU
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.training.token_feed import TokenFeed
from support.trained_runs import TrainedRuns, tiny_run_config

CONSUMED, STEPS = 16, 3


def test_tokens_are_announced_one_step_ahead(trained_runs: TrainedRuns) -> None:
    config = tiny_run_config(trained_runs.folder, "fp32")
    feed = TokenFeed(config, open_run_data(config), ProcessGrid.single(), CPU, num_micro_batches=1, extra_tokens=1)
    announced: list[Tensor] = []
    steps = feed.steps(CONSUMED, STEPS, announced.append)
    assert not announced
    for done in range(STEPS):
        tokens = next(steps)
        assert len(announced) == min(done + 2, STEPS)
        assert tokens is announced[done]
        assert list(tokens.shape) == [1, config.training.micro_batch_size, config.data.seq_length + 1]
    assert next(steps, None) is None
    later = next(feed.steps(CONSUMED + config.training.global_batch_size, 1, announced.append))
    assert torch.equal(later, announced[1])
    assert list(feed.steps(CONSUMED, 0, announced.append)) == []
