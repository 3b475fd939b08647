"""A checkpoint that is older than a key of the model is of a model with the key's default."""

from pathlib import Path

import pytest

from overtok_megatron.checkpoint.changes import check_same_model, same_deepspeed_files
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


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("torch", "compile", True),
        ("auto", "liger", True),
        ("liger", "torch", True),
        ("auto", "apex", False),  # apex's AdamW counts steps elsewhere, and DeepSpeed takes another optimizer for it
        ("apex", "compile", False),
        ("apex", "apex", True),
    ],
)
def test_deepspeeds_files_are_those_of_an_adamw(before: str, after: str, same: bool) -> None:
    manifest = manifest_without(make(training__kernels=before), "training.num_threads")
    config = make(training__kernels=after).model_dump(mode="json")
    assert same_deepspeed_files(config, manifest.layout, manifest) == same


def test_an_optimizer_in_host_memory_is_torchs() -> None:
    """apex's AdamW is not used there, so the choice makes no difference."""
    apex, auto = (make(parallel__offload_optimizer="cpu", training__kernels=name) for name in ("apex", "auto"))
    manifest, config = manifest_without(apex, "training.num_threads"), auto.model_dump(mode="json")
    assert same_deepspeed_files(config, manifest.layout, manifest)
