"""Sizes that follow from a configuration and a world size. Pure; assumes that validation holds."""

import math

from overtok_megatron.config.schema import RunConfig


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Ranks that see different data."""
    return world_size // config.parallel.tensor_parallel_size


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches of one optimizer step on one rank."""
    training = config.training
    return training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, world_size))


def tokens_per_step(config: RunConfig) -> int:
    return config.training.global_batch_size * config.data.seq_length


def train_iters(config: RunConfig) -> int:
    """Optimizer steps of the whole run; a length in tokens is rounded up to whole steps."""
    if config.training.train_iters is not None:
        return config.training.train_iters
    assert config.training.train_tokens is not None
    return math.ceil(config.training.train_tokens / tokens_per_step(config))
