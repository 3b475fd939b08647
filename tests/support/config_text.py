"""A small complete configuration as text, and the lines with which a wrong one is refused."""

from pathlib import Path

import pytest

from overtok_megatron.config.loading import load_config
from overtok_megatron.config.validation import validate
from overtok_megatron.errors import ConfigError

RUN = """\
model: {vocab_size: 1000, hidden_size: 48, intermediate_size: 96, num_layers: 2, num_attention_heads: 4}
tokenizer: {path: t}
data: {train: d, seq_length: 32}
optimizer: {learning_rate: 1e-3}
training: {output_directory: o, micro_batch_size: 1, global_batch_size: 8, train_iters: 10}
"""
TABLES = ["over_encoding.enabled=true"]


def load_and_validate(path: Path, overrides: list[str], world_size: int) -> None:
    loaded = load_config(path, overrides)
    validate(loaded.config, world_size, loaded.locate)


def refusal(path: Path, overrides: list[str], world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        load_and_validate(path, overrides, world_size)
    assert all(line.isprintable() and len(line) < 300 for line in caught.value.lines)
    return str(caught.value)
