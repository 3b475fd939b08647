"""Parameter counts and bytes by formula equal the built model's and its tables' real ones."""

from typing import Any

import pytest
import torch
from torch import nn

from overtok_megatron.config.counts import bytes_per_rank, parameter_counts
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.model.assembly import build_tables, build_transformer
from overtok_megatron.ngram.table import TableShard

CPU = torch.device("cpu")


def configuration(model: dict[str, Any], over: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_layers": 2,
                      "num_attention_heads": 4} | model,
            "over_encoding": over,
            "tokenizer": {"path": "none"},
            "data": {"train": "none", "seq_length": 8},
            "parallel": {"zero_stage": 0},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"output_directory": "none", "micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1,
                         "precision": "fp32"},
        }
    )  # fmt: skip


LLAMA = {"norm_placement": "pre", "qk_norm": "none", "head_size": 20, "num_key_value_heads": 2}
OLMOE = {"num_experts": 7, "num_experts_per_token": 3, "num_layers": 3, "intermediate_size": 10}


def size_of(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


OVER = {"enabled": True, "table_rows": 53}


@pytest.mark.parametrize(
    ("model", "over"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {}),
        ({"num_key_value_heads": 1, "num_layers": 3}, {}),
        ({"num_key_value_heads": 2, "vocab_size": 7}, OVER),
        ({"num_key_value_heads": 2, "tie_word_embeddings": True}, OVER | {"ngram_order": 2, "num_slices": 1}),
        ({"num_attention_heads": 2, "intermediate_size": 5}, OVER | {"ngram_order": 4, "optimizer": "rowwise_adagrad"}),
        ({}, OVER | {"num_slices": 4, "table_rows": 1, "optimizer": "sgd"}),
        ({}, OVER | {"state_dtype": "float32", "row_dtype": "float32", "optimizer": "adam"}),
        ({}, OVER | {"row_dtype": "int8", "optimizer": "rowwise_adam"}),
        ({}, OVER | {"row_width": 5, "added": [{"orders": [5, 2], "num_slices": 3, "table_rows": 9}]}),
        (LLAMA, {}),
        (OLMOE, OVER),
    ],
)
def test_formulas_equal_the_built_model(model: dict[str, Any], over: dict[str, Any]) -> None:
    config = configuration(model, over)
    counts = parameter_counts(config)
    built = build_transformer(config, device=CPU)
    encoder = built.embedding.over_encoding
    assert counts.blocks == size_of(built.blocks) + size_of(built.head.norm)
    assert counts.embedding == built.embedding.word.weight.numel()
    assert counts.head == (0 if config.model.tie_word_embeddings else built.head.output.weight.numel())
    assert counts.encoder == (0 if encoder is None else size_of(encoder))
    assert counts.dense == size_of(built)
    experts = [weight for name, weight in built.named_parameters() if ".experts_" in name]
    chosen = config.model.num_experts_per_token or 0
    assert counts.active == counts.dense - sum(weight[chosen:].numel() for weight in experts)
    needed = bytes_per_rank(config, 1)
    assert needed.weights == needed.gradients == 4 * size_of(built)
    assert needed.optimizer == 8 * size_of(built)
    if encoder is None:
        assert counts.tables == needed.table_rows == needed.table_state == 0
        return
    tables = build_tables(config, built.embedding.over_encoding, 0, device=CPU)
    assert counts.tables == tables.shard.rows.weight.numel() == counts.total - counts.dense
    assert isinstance(tables.shard, TableShard)
    assert tables.optimizer is not None
    assert needed.table_rows == sum(column.nbytes for column in tables.shard.columns().values())
    assert needed.table_state == sum(state.nbytes for state in tables.optimizer.state.values())


@pytest.mark.parametrize("width", [32, 64, 256])
def test_tables_cost_little_more_than_two_bytes_a_parameter_by_default(width: int) -> None:
    config = configuration({"hidden_size": 4 * width, "num_attention_heads": 4}, OVER | {"table_rows": 10**6})
    needed = bytes_per_rank(config, 1)
    assert (needed.table_rows + needed.table_state) / parameter_counts(config).tables <= 2.1
