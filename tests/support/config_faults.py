"""A valid configuration from keys, and a fault for every rule across keys."""

from typing import Any, NamedTuple

from overtok_megatron.config.schema import RunConfig

WORLD = 4  # ranks for which the faults are faults


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


class Fault(NamedTuple):
    """changes: of a valid configuration, as `make` takes them; key: what is refused; way_out: what the message says."""

    changes: dict[str, Any]
    key: str
    way_out: str


FAULTS = [
    Fault(*one)
    for one in (
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
        (OVER | {"over_encoding__dropout": [0.1, 0.2, 0.3]}, "over_encoding.dropout", "one for each order from 2 to 3"),
        (
            OVER | {"over_encoding__word_embedding": False, "model__tie_word_embeddings": True},
            "over_encoding.word_embedding",
            "tie_word_embeddings: false",
        ),
        (OVER | {"over_encoding__num_slices": 5}, "over_encoding.num_slices", "or give over_encoding.row_width"),
        ({"parallel__zero_stage": 3, "parallel__tensor_parallel_size": 2}, "parallel.zero_stage", "use 2"),
        ({"training__train_tokens": 5}, "training.train_iters", "not both"),
        ({"training__train_iters": None}, "training.train_iters", "give either"),
        (
            {"training__initial_state": "everything"},
            "training.initial_state",
            "name a run or a checkpoint there, or write weights",
        ),
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
        ({"over_decoding__num_tokens": 3}, "over_decoding.loss_weights", "write [0.1, 0.1]"),
        (
            {"over_decoding__num_tokens": 2, "over_decoding__loss_weights": [0.5, 0.2]},
            "over_decoding.loss_weights",
            "one weight for table 2; write [0.5]",
        ),
        (
            {"over_decoding__num_tokens": 17, "over_decoding__loss_weights": [0.1] * 16},
            "over_decoding.num_tokens",
            "16 is",
        ),
        ({"over_decoding__num_tokens": 2, "over_decoding__low_rank": 49}, "over_decoding.low_rank", "48 is the most"),
        ({"training__train_only": "heads"}, "training.train_only", "needs a model with such heads"),
        (
            {
                "training__train_only": "heads",
                "multi_token_prediction__depth": 1,
                "parallel__pipeline_parallel_size": 2,
            },
            "training.train_only",
            "use parallel.pipeline_parallel_size 1",
        ),
        ({"multi_token_prediction__depth": 16}, "multi_token_prediction.depth", "15 is the most"),
        ({"logging__trace_steps": [3, 3], "logging__trace_ranks": [4]}, "logging.trace_ranks", "0 to 3 are"),
    )
]
