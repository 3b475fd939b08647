"""Parameters, bytes per rank and FLOPs per token of a configuration, by formula. Tests compare with the built model."""

from dataclasses import dataclass

from overtok_megatron.config.derived import (
    attention_windows,
    block_parameters,
    blocks_per_stage,
    data_parallel_size,
    has_word_embedding,
    head_size,
    multi_token_parameters,
    over_decoding_parameters,
    row_width,
)
from overtok_megatron.config.schema import RowRule, RunConfig

# The state of each row optimizer by name, and whether it has one value per element of a row, or else one per row.
ROW_STATES: dict[RowRule, dict[str, bool]] = {
    "rowwise_adagrad": {"square_sum": False},
    "rowwise_adam": {"exp_avg": True, "exp_avg_sq": False},
    "adam": {"exp_avg": True, "exp_avg_sq": True},
    "sgd": {},
}
_ROW_BYTES = {"float32": (0, 4), "bfloat16": (0, 2), "int8": (4, 1)}


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """blocks: attention, feed-forward and norms; embedding: V d, or 0 without 1-grams; head: V d, or 0 if tied; encoder: the
    n-gram projections; over_decoding: output tables 2 and further, with their projections; multi_token: the layers of
    multi-token prediction; tables: rows x width over all n-gram tables; idle: those of the experts (part of blocks and
    multi_token) that a token skips."""

    blocks: int
    embedding: int
    head: int
    encoder: int
    tables: int
    over_decoding: int = 0
    multi_token: int = 0
    idle: int = 0

    @property
    def active(self) -> int:
        """Dense parameters that take part in a token's forward pass."""
        return self.dense - self.idle

    @property
    def dense(self) -> int:
        return self.blocks + self.embedding + self.head + self.encoder + self.over_decoding + self.multi_token

    @property
    def total(self) -> int:
        return self.dense + self.tables


def table_shape(config: RunConfig) -> tuple[int, int, int]:
    """(tables, rows over all of them, width of a row); zeros for a plain model."""
    over = config.over_encoding
    if not over.enabled or over.table_rows is None:
        return 0, 0, 0
    groups = [((over.ngram_order - 1) * over.num_slices, over.table_rows)]
    groups += [(len(group.orders) * group.num_slices, group.table_rows) for group in over.added]
    rows = sum(tables * first + tables * (tables - 1) for tables, first in groups)
    return sum(tables for tables, _ in groups), rows, row_width(config.model, over)


def parameter_counts(config: RunConfig) -> ParameterCounts:
    model = config.model
    d = model.hidden_size
    skipped = (model.num_experts or 0) - (model.num_experts_per_token or 0)
    tables, rows, width = table_shape(config)
    return ParameterCounts(
        blocks=model.num_layers * sum(block_parameters(model)) + d,
        embedding=model.vocab_size * d if has_word_embedding(config.over_encoding) else 0,
        head=0 if model.tie_word_embeddings else model.vocab_size * d,
        encoder=d * tables * width,
        tables=rows * width,
        over_decoding=over_decoding_parameters(config, model.vocab_size),
        multi_token=sum(multi_token_parameters(config)),
        idle=(model.num_layers + config.multi_token_prediction.depth) * skipped * 3 * d * model.intermediate_size,
    )


def _heads_shard(config: RunConfig) -> int:
    """Parameters of the heads for later tokens on the tensor-parallel rank that holds most of them, on the last stage."""
    tensor = config.parallel.tensor_parallel_size
    split, whole = multi_token_parameters(config)
    return over_decoding_parameters(config, -(-config.model.vocab_size // tensor)) + split // tensor + whole


def _dense_shard(config: RunConfig) -> int:
    """Dense parameters of the fullest rank: the first tensor-parallel rank (the vocabulary is split unevenly; the norms of the
    residual stream, routers and the n-gram projection are on every rank) of the fullest pipeline stage."""
    model, tensor, count = config.model, config.parallel.tensor_parallel_size, parameter_counts(config)
    stages = blocks_per_stage(config)
    split, whole = block_parameters(model)
    vocabulary = -(-model.vocab_size // tensor) * model.hidden_size
    loads = [blocks * (split // tensor + whole) for blocks in stages]
    loads[0] += (vocabulary if has_word_embedding(config.over_encoding) else 0) + count.encoder
    loads[-1] += model.hidden_size + _heads_shard(config)  # the final norm, and the heads for later tokens
    if not model.tie_word_embeddings or len(stages) > 1:  # a tied head on another stage is a copy
        loads[-1] += vocabulary
    if config.multi_token_prediction.depth and len(stages) > 1:  # which embeds: copies of the embedding's dense parts
        loads[-1] += count.encoder
        if has_word_embedding(config.over_encoding) and not model.tie_word_embeddings:
            loads[-1] += vocabulary
    return max(loads)


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Bytes of model state on the fullest rank; activations come on top and depend on the batch."""

    weights: int
    gradients: int
    optimizer: int
    table_rows: int
    table_state: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.table_rows + self.table_state


def bytes_per_rank(config: RunConfig, world_size: int) -> RankBytes:
    """The fullest of `world_size` ranks.

    bf16: 2 bytes per weight, 4 per gradient (2 without ZeRO), 12 for master weights and moments; fp32: 4, 4 and 8. ZeRO 1
    divides the last by the data- and context-parallel sizes, 2 the gradients too, 3 the weights too. Tables are divided by
    the whole world. Weights that are not trained have no gradient and no optimizer state.
    """
    dense = _dense_shard(config)
    trained = dense if config.training.train_only is None else _heads_shard(config)
    zero_stage = config.parallel.zero_stage
    ranks = data_parallel_size(config, world_size) * config.parallel.context_parallel_size
    bf16 = config.training.precision == "bf16"
    _, rows, width = table_shape(config)
    own_rows = -(-rows // world_size)
    is_per_element = ROW_STATES[config.over_encoding.optimizer].values()
    state_values = sum(width if per_element else 1 for per_element in is_per_element)  # per row
    scale_bytes, value_bytes = _ROW_BYTES[config.over_encoding.row_dtype]
    state_bytes = 4 if config.over_encoding.state_dtype == "float32" else 2

    def share(size: int, from_zero_stage: int) -> int:
        return -(-size // ranks) if zero_stage >= from_zero_stage else size

    return RankBytes(
        weights=share(dense * (2 if bf16 else 4), 3),
        gradients=share(trained * (2 if bf16 and zero_stage == 0 else 4), 2),
        optimizer=share(trained * (12 if bf16 else 8), 1),
        table_rows=own_rows * (width * value_bytes + scale_bytes + 1),  # and one byte for its flag
        table_state=own_rows * state_values * state_bytes,
    )


def flops_per_token(config: RunConfig) -> float:
    """Forward and backward of one token: 6 FLOPs per weight of every product that it takes part in (the look-ups are none),
    and attention's two products over the positions that a layer sees, on average half the sequence or less: 12 h e each.

    Each depth of multi-token prediction embeds a token, and multiplies by the head's weight, once more. Where only heads are
    trained, the main model has a third of these, its forward pass; and the head's weight has no gradient."""
    model, count, length = config.model, parameter_counts(config), config.data.seq_length
    depth, frozen = config.multi_token_prediction.depth, config.training.train_only is not None
    head, idle = model.vocab_size * model.hidden_size, count.idle / (model.num_layers + depth)  # of a layer
    main = count.blocks - model.num_layers * idle + head + (1 + depth) * count.encoder
    heads = count.multi_token - depth * idle + count.over_decoding
    windows = [min(window or length, length) for window in attention_windows(model)]
    seen = sum(window - window * (window - 1) / (2 * length) - 0.5 for window in windows)  # half of its own position
    attention = 12.0 * model.num_attention_heads * head_size(model)
    own = 6.0 * heads + (4.0 if frozen else 6.0) * depth * head + attention * depth * length / 2
    return own + (6.0 * main + attention * seen) * (1 / 3 if frozen else 1.0)
