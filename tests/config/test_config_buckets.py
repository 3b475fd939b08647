"""DeepSpeed's buckets of gradients are no larger than the model, and what the user asks for otherwise."""

from typing import Any

import pytest
from gpu_checks.training import configuration

from overtok_megatron.config.counts import parameter_counts
from overtok_megatron.config.deepspeed_config import derive
from overtok_megatron.config.schema import RunConfig

SMALL = {
    "model.vocab_size": 515, "model.hidden_size": 64, "model.intermediate_size": 104, "model.num_layers": 2,
    "model.num_attention_heads": 4, "data.seq_length": 64, "training.micro_batch_size": 1,
    "training.global_batch_size": 1,
}  # fmt: skip
LARGE = SMALL | {"model.hidden_size": 4096, "model.intermediate_size": 16384, "model.num_layers": 4}


def bucket(config: RunConfig) -> Any:
    return derive(config, 1)["zero_optimization"].get("reduce_bucket_size")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_are_no_larger_than_the_model(stage: int) -> None:
    small, large = (configuration(shape | {"parallel.zero_stage": stage}, 1) for shape in (SMALL, LARGE))
    assert bucket(small) == parameter_counts(small).dense
    assert bucket(large) == 500_000_000 < parameter_counts(large).dense
    given = small.model_copy(update={"deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000}}})
    assert bucket(given) == 1000


def test_without_zero_there_are_none() -> None:
    assert bucket(configuration(SMALL | {"parallel.zero_stage": 0}, 1)) is None
