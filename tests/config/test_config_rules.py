"""Rules across keys, collisions, derived sizes, DeepSpeed's dictionary."""

from typing import Any

import pytest

from overtok_megatron.config.collisions import collision_problem
from overtok_megatron.config.counts import bytes_per_rank, flops_per_token, parameter_counts
from overtok_megatron.config.deepspeed_config import derive
from overtok_megatron.config.derived import accumulation_steps, blocks_per_stage, train_iters
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.validation import validate
from overtok_megatron.errors import ConfigError


def make(**changes: Any) -> RunConfig:
    """A valid configuration for 1, 2 and 4 ranks; keys are given as section__name."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": 1000,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_layers": 2,
            "num_attention_heads": 4,
        },
        "tokenizer": {"path": "t"},
        "data": {"train": "d", "seq_length": 16},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"output_directory": "o", "micro_batch_size": 2, "global_batch_size": 16, "train_iters": 10},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return RunConfig.model_validate(values)


OVER = {"over_encoding__enabled": True, "over_encoding__table_rows": 128_618}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_valid_one(world: int) -> None:
    config = make(**OVER, over_encoding__num_slices=5, over_encoding__row_width=9)
    validate(config, world, lambda key: "here")
    assert accumulation_steps(config, world) == 8 // world


@pytest.mark.parametrize(
    ("changes", "key", "way_out"),
    [
        ({"parallel__tensor_parallel_size": 3}, "parallel.tensor_parallel_size", "2 does"),
        ({"parallel__sequence_parallel": True}, "parallel.sequence_parallel", "write false"),
        ({"parallel__tensor_parallel_size": 4, "data__seq_length": 18}, "data.seq_length", "20 is"),
        ({"training__global_batch_size": 9}, "training.global_batch_size", "8 is"),
        ({"model__num_attention_heads": 5}, "model.num_attention_heads", "4 does"),
        ({"model__num_attention_heads": 16}, "model.num_attention_heads", "odd size 3"),
        ({"model__num_key_value_heads": 3}, "model.num_key_value_heads", "2 does"),
        (
            {"parallel__tensor_parallel_size": 4, "model__num_key_value_heads": 2},
            "model.num_key_value_heads",
            "multiple",
        ),
        ({"parallel__tensor_parallel_size": 4, "model__intermediate_size": 66}, "model.intermediate_size", "multiple"),
        ({"tokenizer__type": "bytes"}, "tokenizer.path", "write null"),
        (
            {"tokenizer__type": "bytes", "tokenizer__path": None, "tokenizer__eod_token": "x"},
            "tokenizer.eod_token",
            "256 ends documents",
        ),
        ({"tokenizer__type": "hugging_face", "tokenizer__path": None}, "tokenizer.path", "is needed"),
        ({"over_encoding__enabled": True}, "over_encoding.table_rows", "is needed"),
        ({"over_encoding__enabled": True, "over_encoding__table_rows": 2**31}, "over_encoding.table_rows", "2^31"),
        (
            {"over_encoding__enabled": True, "over_encoding__table_rows": 1618, "over_encoding__pad_id": 1000},
            "over_encoding.pad_id",
            "vocabulary of 1000",
        ),
        (
            {"over_encoding__enabled": True, "over_encoding__table_rows": 128_000},
            "over_encoding.table_rows",
            "is a good size nearby",
        ),
        (
            OVER | {"over_encoding__added": [{"orders": [2, 4, 2], "table_rows": 5}]},
            "over_encoding.added",
            "names an order twice",
        ),
        (
            OVER | {"over_encoding__added": [{"orders": [2], "table_rows": 7}, {"orders": [2], "table_rows": 100_000}]},
            "over_encoding.added",
            "is a good size nearby",
        ),
        (
            OVER | {"over_encoding__added": [{"orders": [2, 3], "num_slices": 2, "table_rows": 2**31 - 6}]},
            "over_encoding.added",
            f"at most {2**31 - 7}",
        ),
        (OVER | {"over_encoding__num_slices": 5}, "over_encoding.num_slices", "or give over_encoding.row_width"),
        ({"parallel__zero_stage": 3, "parallel__tensor_parallel_size": 2}, "parallel.zero_stage", "use 2"),
        ({"training__train_tokens": 5}, "training.train_iters", "not both"),
        ({"training__train_iters": None}, "training.train_iters", "give either"),
        ({"optimizer__warmup_iters": 10}, "optimizer.warmup_iters", "less than the 10 steps"),
        ({"optimizer__min_learning_rate": 1.0}, "optimizer.min_learning_rate", "0.001"),
        ({"optimizer__schedule": "wsd"}, "optimizer.decay_iters", "needs it"),
        ({"optimizer__decay_iters": 3}, "optimizer.decay_iters", "remove it"),
        ({"parallel__zero_stage": 0}, "parallel.zero_stage", "use 1"),
        ({"parallel__pipeline_parallel_size": 3}, "parallel.pipeline_parallel_size", "2 does"),
        (
            {"parallel__pipeline_parallel_size": 4, "parallel__tensor_parallel_size": 2},
            "parallel.pipeline_parallel_size",
            "the 2 ranks left by the other axes of 4; 2 does",
        ),
        ({"parallel__pipeline_parallel_size": 4}, "parallel.pipeline_parallel_size", "2 is the most"),
        ({"parallel__pipeline_parallel_size": 2, "parallel__zero_stage": 2}, "parallel.zero_stage", "use 1"),
        ({"parallel__pipeline_parallel_size": 2, "parallel__zero_stage": 0}, "parallel.zero_stage", "use 1"),
        (
            {"parallel__pipeline_parallel_size": 2, "parallel__pipeline_partition": [2, 1]},
            "parallel.pipeline_partition",
            "2 numbers (pipeline_parallel_size) with the sum 2 (model.num_layers); uniform is [1, 1]",
        ),
        (
            {"parallel__pipeline_parallel_size": 2, "parallel__offload_optimizer": "cpu"},
            "parallel.offload_optimizer",
            "use none",
        ),
        (
            {"parallel__offload_optimizer": "cpu", "parallel__zero_stage": 0, "training__precision": "fp32"},
            "parallel.offload_optimizer",
            "use zero_stage 1",
        ),
        ({"parallel__context_parallel_size": 3}, "parallel.context_parallel_size", "2 does"),
        ({"parallel__context_parallel_size": 4, "data__seq_length": 18}, "data.seq_length", "20 is"),
        (
            {"parallel__context_parallel_size": 4, "model__num_key_value_heads": 2},
            "model.num_key_value_heads",
            "multiple of parallel.tensor_parallel_size x context_parallel_size 4",
        ),
        ({"logging__trace_steps": [3]}, "logging.trace_steps", "as [3, 4]"),
        ({"model__head_size": 5}, "model.head_size", "6 does"),
        ({"model__full_attention_interval": 4}, "model.full_attention_interval", "no model.sliding_window"),
        ({"model__attention_pattern": ["full", "full"]}, "model.attention_pattern", "no model.sliding_window"),
        (
            {"model__sliding_window": 4, "model__attention_pattern": ["full"]},
            "model.attention_pattern",
            "each of the 2 layers",
        ),
        (
            {"model__sliding_window": 4, "model__attention_pattern": ["full"] * 2, "model__full_attention_interval": 2},
            "model.full_attention_interval",
            "remove one",
        ),
        (
            {"model__rope_scaling": {"type": "yarn", "factor": 2.0}},
            "model.rope_scaling.original_max_position_embeddings",
            "is needed by type yarn",
        ),
        (
            {"model__rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3.0}},
            "model.rope_scaling.beta_fast",
            "no part of type linear",
        ),
        (
            {
                "model__rope_scaling": {
                    "type": "llama3",
                    "factor": 2.0,
                    "original_max_position_embeddings": 8,
                    "low_freq_factor": 4.0,
                }
            },
            "model.rope_scaling.low_freq_factor",
            "less than high_freq_factor 4.0",
        ),
        (
            {"model__rope_scaling": {"type": "linear", "factor": 2.0}, "model__sliding_window": 4},
            "model.rope_scaling",
            "every layer slides",
        ),
        ({"model__num_experts_per_token": 2}, "model.num_experts_per_token", "needs model.num_experts"),
        ({"model__num_experts": 4}, "model.num_experts_per_token", "4 is usual"),
        ({"model__num_experts": 4, "model__num_experts_per_token": 5}, "model.num_experts_per_token", "4 is the most"),
        ({"logging__trace_steps": [3, 3], "logging__trace_ranks": [4]}, "logging.trace_ranks", "0 to 3 are"),
    ],
)
def test_rules(changes: dict[str, Any], key: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(make(**changes), 4, lambda key: "place")
    message = str(caught.value)
    assert message.startswith(f"place: {key}: ")
    assert way_out in message
    assert "\n" not in message


# METHOD's measurements (4M Zipf draws): sizes whose tokens share rows far more than a random hash's would, and others.
BAD = [(50280, 64 * 50280), (50280, 64 * 50280 + 1), (32000, 12_800_000), (128_000, 12_800_000), (64_000, 12_800_000)]
GOOD = [(50280, 3_200_000), (32000, 12_900_001), (128_000, 12_900_001), (50280, 12_800_000), (100_278, 12_800_000)]


@pytest.mark.parametrize(("base", "rows"), BAD)
def test_collisions_are_caught_and_mended(base: int, rows: int) -> None:
    problem = collision_problem(rows, base, 4)
    assert problem is not None
    assert abs(problem.proposed_rows - rows) <= base
    assert collision_problem(problem.proposed_rows, base, 4) is None


@pytest.mark.parametrize(("base", "rows"), GOOD)
def test_good_sizes_pass(base: int, rows: int) -> None:
    assert collision_problem(rows, base, 4) is None


def test_later_tables_are_judged_too() -> None:
    problem = collision_problem(1946, 1000, 4)  # tables of 1946, 1948, 1950, 1952 rows
    assert problem is not None
    assert problem.table == 3


def test_tokens_give_whole_steps() -> None:
    assert train_iters(make(training__train_iters=None, training__train_tokens=257)) == 2
    assert train_iters(make(training__train_iters=None, training__train_tokens=256)) == 1


def test_deepspeed_keys() -> None:
    derived = derive(make(parallel__zero_stage=2, deepspeed__zero_optimization={"overlap_comm": True}), 2)
    zero = derived["zero_optimization"]
    assert zero.pop("reduce_bucket_size") > 0
    assert zero == {"stage": 2, "overlap_comm": True}
    assert derived["bf16"] == {"enabled": True}
    assert derived["gradient_accumulation_steps"] == 4
    assert derived["data_types"] == {"grad_accum_dtype": "fp32"}
    for raw in ({"zero_optimization": {"stage": 3}}, {"optimizer": {}}, {"fp16": {"enabled": True}}):
        with pytest.raises(ConfigError, match=r"deepspeed\."):
            derive(make().model_copy(update={"deepspeed": raw}), 2)
    derive(make().model_copy(update={"deepspeed": {"gradient_clipping": 1.0}}), 2)  # the same value is no contradiction


def test_the_papers_counts() -> None:
    config = make(
        model__vocab_size=50280,
        model__hidden_size=1024,
        over_encoding__enabled=True,
        over_encoding__table_rows=12_800_000,
    )
    assert parameter_counts(config).tables == pytest.approx(13.1e9, rel=1e-3)


def test_bytes_fall_with_the_stage() -> None:
    sizes = [bytes_per_rank(make(parallel__zero_stage=stage, training__global_batch_size=4), 2) for stage in range(4)]
    assert sizes[1].optimizer * 2 == sizes[0].optimizer
    assert sizes[2].gradients < sizes[1].gradients
    assert sizes[3].weights < sizes[2].weights


def test_flops_count_the_head_and_no_look_up() -> None:
    small, large = make(), make(model__vocab_size=2000)
    assert flops_per_token(large) - flops_per_token(small) == 6 * 1000 * 48


def test_flops_count_what_a_token_meets() -> None:
    """Of experts those that it goes to; of positions those that a layer sees, on average."""
    experts = {"model__num_experts": 8, "model__num_experts_per_token": 2}
    router = 6 * 2 * 48 * 8
    assert flops_per_token(make(**experts)) - flops_per_token(make()) == 6 * 2 * 3 * 48 * 64 + router
    seen = (
        sum(min(position, 4) for position in range(1, 17)) / 16 - 0.5
    )  # half of a position's own product is not counted
    difference = flops_per_token(make()) - flops_per_token(
        make(model__sliding_window=4, model__full_attention_interval=2)
    )
    assert difference == pytest.approx(12 * 48 * (8 - seen))


@pytest.mark.parametrize(
    ("stages", "partition", "expected"),
    [
        (1, "uniform", [5]),
        (2, "uniform", [3, 2]),
        (3, "uniform", [2, 2, 1]),
        (3, "parameters", [1, 3, 1]),  # the embedding and the head weigh about two blocks each
        (3, [1, 4, 0], [1, 4, 0]),
    ],
)
def test_blocks_of_a_stage(stages: int, partition: Any, expected: list[int]) -> None:
    config = make(model__num_layers=5, parallel__pipeline_parallel_size=stages, parallel__pipeline_partition=partition,
                  model__vocab_size=700)  # fmt: skip
    assert blocks_per_stage(config) == expected


def test_context_ranks_are_data_ranks_to_deepspeed() -> None:
    config = make(parallel__context_parallel_size=2)
    assert accumulation_steps(config, 4) == 4
    derived = derive(config, 4)
    batch = derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * 4
    assert derived["train_batch_size"] == batch == 32


def test_stages_of_sequence_parallel_ranks_send_all_of_their_activations() -> None:
    config = make(
        parallel__tensor_parallel_size=2, parallel__pipeline_parallel_size=2, parallel__sequence_parallel=True
    )
    assert derive(config, 4)["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
