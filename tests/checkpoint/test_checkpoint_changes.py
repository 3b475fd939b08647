"""A checkpoint that is older than a key of the model is of a model with the key's default."""

from pathlib import Path

import pytest

from overtok_megatron.checkpoint.changes import check_same_model
from overtok_megatron.checkpoint.layout import CheckpointLayout
from overtok_megatron.checkpoint.store import Manifest
from overtok_megatron.config.schema import RunConfig
from support.config_faults import OVER, make
from support.expect_error import expect_error


def manifest_without(config: RunConfig, key: str) -> Manifest:
    """The manifest of a run of `config`, written before there was the key `key`."""
    values = config.model_dump(mode="json")
    section, name = key.split(".")
    del values[section][name]
    return Manifest(
        step=1,
        consumed_samples=1,
        config=values,
        layout=CheckpointLayout(zero_stage=0),
        eod_id=0,
        tokenizer_fingerprint="none",
        files={},
    )


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("model.norm_placement", "pre"),  # a default that is neither null nor false
        ("model.rope_theta", 1e4),
        ("model.sliding_window", 8),
        ("over_encoding.boundary", "ignore"),
        ("over_encoding.added", [{"orders": [2], "num_slices": 1, "table_rows": 5, "frozen": False}]),
    ],
)
def test_a_key_younger_than_the_checkpoint(key: str, other: object) -> None:
    config, path = make(**OVER), Path("checkpoint")
    manifest = manifest_without(config, key)
    values = config.model_dump(mode="json")
    check_same_model(values, manifest, path)
    section, name = key.split(".")
    values[section][name] = other
    expect_error(lambda: check_same_model(values, manifest, path), f"{key} is", "there")
