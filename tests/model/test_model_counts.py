"""Parameter counts and bytes by formula equal the built model's and its tables' real ones."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from overtok_megatron.config.counts import bytes_per_rank, flops_per_token, parameter_counts
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.model.heads import LaterTokens
from support.assembling import cpu_model, cpu_tables

CPU = torch.device("cpu")


def configuration(
    model: dict[str, Any], over: dict[str, Any], length: int = 8, over_decoding: dict[str, Any] | None = None
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_layers": 2,
                      "num_attention_heads": 4} | model,
            "over_encoding": over,
            "over_decoding": over_decoding or {},
            "tokenizer": {"path": "none"},
            "data": {"train": "none", "seq_length": length},
            "parallel": {"zero_stage": 0},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"output_directory": "none", "micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1,
                         "precision": "fp32", "kernels": "torch"},
        }
    )  # fmt: skip


LLAMA = {"norm_placement": "pre", "qk_norm": "none", "head_size": 20, "num_key_value_heads": 2}
OLMOE = {"num_experts": 7, "num_experts_per_token": 3, "num_layers": 3, "intermediate_size": 10}


def size_of(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


OUTPUTS: list[dict[str, Any]] = [{"num_tokens": 2}, {"num_tokens": 3, "loss_weights": [0.1, 0.1], "low_rank": 5}]
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
@pytest.mark.parametrize("over_decoding", [{}, *OUTPUTS], ids=["one table", "two", "low rank"])
def test_formulas_equal_the_built_model(
    model: dict[str, Any], over: dict[str, Any], over_decoding: dict[str, Any]
) -> None:
    config = configuration(model, over, over_decoding=over_decoding)
    counts = parameter_counts(config)
    built = cpu_model(config)
    encoder = built.embedding.over_encoding
    assert counts.blocks == size_of(built.blocks) + size_of(built.head.norm)
    assert counts.embedding == built.embedding.word.weight.numel()
    assert counts.head == (0 if config.model.tie_word_embeddings else built.head.output.weight.numel())
    assert counts.encoder == (0 if encoder is None else size_of(encoder))
    assert counts.over_decoding == (size_of(built.over_decoding) if built.over_decoding is not None else 0)
    assert (counts.over_decoding > 0) == bool(over_decoding)
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
    tables = cpu_tables(config, 0)
    assert counts.tables == tables.store.rows.weight.numel() == counts.total - counts.dense
    assert needed.table_rows == sum(column.nbytes for column in tables.store.columns().values())
    assert needed.table_state == sum(state.nbytes for state in tables.optimizer.state.values())


@pytest.mark.parametrize("width", [32, 64, 256])
def test_tables_cost_little_more_than_two_bytes_a_parameter_by_default(width: int) -> None:
    config = configuration({"hidden_size": 4 * width, "num_attention_heads": 4}, OVER | {"table_rows": 10**6})
    needed = bytes_per_rank(config, 1)
    assert (needed.table_rows + needed.table_state) / parameter_counts(config).tables <= 2.1


@pytest.mark.parametrize(
    ("model", "over"),
    [({}, {}), ({"tie_word_embeddings": True, "num_key_value_heads": 2}, OVER), (LLAMA, {}), (OLMOE, OVER)],
)
@pytest.mark.parametrize("over_decoding", [{}, *OUTPUTS], ids=["one table", "two", "low rank"])
def test_flops_of_products_are_those_that_torch_counts(
    model: dict[str, Any], over: dict[str, Any], over_decoding: dict[str, Any]
) -> None:
    """torch's counter sees every matrix product of a real step, the heads' among them; attention has a test of its own."""
    config = configuration(model, over, over_decoding=over_decoding)
    built = cpu_model(config)
    tokens = torch.randint(0, 101, (2, 9))
    fetched = None
    if config.over_encoding.enabled:
        tables = cpu_tables(config, 0)
        fetched = tables.fetch_rows(tokens[:, :-1], training=True)
    later = LaterTokens((tokens[:, 1:], tokens[:, 1:]), (), torch.ones(2)) if over_decoding else None
    with FlopCounterMode(display=False) as counter:
        built(tokens[:, :-1], fetched, tokens[:, 1:], later=later).objective.backward()
    products = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
    by_operator = counter.get_flop_counts()["Global"]
    counted = sum(flops for name, flops in by_operator.items() if str(name).split(".")[-1] in products)
    shape = config.model
    width = shape.num_attention_heads * (shape.head_size or shape.hidden_size // shape.num_attention_heads)
    attention = 12.0 * width * shape.num_layers * 8 / 2
    norms = sum(weight.numel() for weight in built.parameters() if weight.ndim < 2)
    assert flops_per_token(config) - attention - 6 * norms == pytest.approx(counted / 16)


def test_flops_of_attention_are_those_of_the_positions_that_are_seen() -> None:
    """Two products forward and four backward per pair of positions, the pair with itself half: 12 e h each."""
    length, heads, size, window = 8, 4, 12, 3
    for pattern, seen in (([None], length), ([window], window)):
        plain = {"sliding_window": window, "full_attention_interval": 10**6} if pattern[0] else {}
        config = configuration({"num_layers": 1, **plain}, {})
        pairs = sum(min(position + 1, seen) - 0.5 for position in range(length))
        expected = 12.0 * heads * size * pairs / length
        without = configuration({"num_layers": 1, **plain}, {}, length=1)
        products = flops_per_token(without) - 12.0 * heads * size * 0.5
        assert flops_per_token(config) - products == pytest.approx(expected)


def test_flops_of_a_published_shape() -> None:
    """OLMo2-1B (16 layers, d = 2048, feed-forward 8192, V = 100,278, sequences of 4096), counted by hand."""
    config = configuration(
        {
            "vocab_size": 100_278,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_layers": 16,
            "num_attention_heads": 16,
        },
        {},
        length=4096,
    )
    attention_weights, feed_forward, head = 4 * 2048**2, 3 * 2048 * 8192, 100_278 * 2048
    norms = 16 * 4 * 2048 + 2048
    expected = 6 * (16 * (attention_weights + feed_forward) + head + norms) + 16 * 12 * 2048 * 4096 / 2
    assert flops_per_token(config) == expected == 8480772096.0
