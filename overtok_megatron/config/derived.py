"""Sizes that follow from a configuration and a world size. Pure; assumes that validation holds."""

from heapq import heapify, heapreplace

from overtok_megatron.config.output_schema import MultiTokenPredictionConfig, OverDecodingConfig
from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, RowRule, RunConfig


def head_size(model: ModelConfig) -> int:
    """Width of an attention head."""
    return model.head_size or model.hidden_size // model.num_attention_heads


def key_value_heads(model: ModelConfig) -> int:
    return model.num_key_value_heads or model.num_attention_heads


def attention_windows(model: ModelConfig) -> list[int | None]:
    """How many positions each layer sees, its own included; None = all before it."""
    window = model.sliding_window
    if window is None:
        return [None] * model.num_layers
    if model.attention_pattern is not None:
        return [window if kind == "sliding" else None for kind in model.attention_pattern]
    interval = model.full_attention_interval
    return [None if interval and (index + 1) % interval == 0 else window for index in range(model.num_layers)]


def block_parameters(model: ModelConfig) -> tuple[int, int]:
    """A block's parameters that tensor parallelism splits (matrices, norms of q and k), and those on every rank."""
    d, experts = model.hidden_size, model.num_experts
    queries, keys = (heads * head_size(model) for heads in (model.num_attention_heads, key_value_heads(model)))
    attention = 2 * d * (queries + keys)  # q and o; k and v
    if model.qk_norm == "full":
        attention += queries + keys
    router = d * experts if experts else 0
    return attention + 3 * d * model.intermediate_size * (experts or 1), 2 * d + router


def over_decoding_parameters(config: RunConfig, rows: int) -> int:
    """Of output tables 2 and further, with `rows` rows of each; their projections are on every tensor-parallel rank."""
    section, d = config.over_decoding, config.model.hidden_size
    rank = section.low_rank
    return (section.num_tokens - 1) * (rows * d if rank is None else rank * (rows + d))


def multi_token_parameters(config: RunConfig) -> tuple[int, int]:
    """Of all depths of multi-token prediction: parameters that tensor parallelism splits, and those on every rank."""
    depth, d = config.multi_token_prediction.depth, config.model.hidden_size
    split, whole = block_parameters(config.model)
    return depth * split, depth * (whole + 2 * d * d + 3 * d)  # a block, a projection of two halves, three norms


def validation_sets(config: RunConfig) -> dict[str, str]:
    """Prefixes of the validation sets by name, in the order given; a single one without a name has the name ""."""
    given = config.data.validation
    if given is None:
        return {}
    return {"": given} if isinstance(given, str) else dict(given)


def table_orders(over: OverEncodingConfig) -> set[int]:
    """The n-gram orders that have tables."""
    return {*range(2, over.ngram_order + 1), *(order for group in over.added for order in group.orders)}


def dropout_rates(config: RunConfig) -> dict[int, float]:
    """The share of look-ups that training drops, by n-gram order; empty where nothing is dropped."""
    given, orders = config.over_encoding.dropout, table_orders(config.over_encoding)
    rates = {order: given[order - 2] if isinstance(given, list) else given for order in sorted(orders)}
    return rates if any(rates.values()) else {}


def ranks_per_batch(config: RunConfig) -> int:
    """Ranks that see the same samples: they hold one copy of the model for each slice of the sequences."""
    parallel = config.parallel
    return parallel.pipeline_parallel_size * parallel.context_parallel_size * parallel.tensor_parallel_size


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Copies of the model that see different samples."""
    return world_size // ranks_per_batch(config)


def part_start(total: int, parts: int, index: int) -> int:
    """Where part `index` of `total` entries begins: the first `total % parts` parts have one entry more than the others."""
    base, remainder = divmod(total, parts)
    return index * base + min(index, remainder)


def even_parts(total: int, parts: int) -> list[int]:
    """The sizes of parts that are as even as can be; earlier parts may have one entry more."""
    return [part_start(total, parts, index + 1) - part_start(total, parts, index) for index in range(parts)]


def blocks_per_stage(config: RunConfig) -> list[int]:
    """How many blocks each pipeline stage holds, by parallel.pipeline_partition.

    "uniform": as even as can be, earlier stages one more. "parameters": the largest stage is as small as can be, the
    embedding counted on the first, and on the last the heads and the layers of multi-token prediction.
    """
    model, parallel = config.model, config.parallel
    stages, partition = parallel.pipeline_parallel_size, parallel.pipeline_partition
    if isinstance(partition, list):
        return partition
    if partition == "uniform":
        return even_parts(model.num_layers, stages)
    block = sum(block_parameters(model))
    counts, loads = [0] * stages, [0] * stages
    loads[0] += model.vocab_size * model.hidden_size if has_word_embedding(config.over_encoding) else 0
    loads[-1] += model.vocab_size * model.hidden_size + over_decoding_parameters(config, model.vocab_size)
    loads[-1] += sum(multi_token_parameters(config))
    lightest = [(load, stage) for stage, load in enumerate(loads)]
    heapify(lightest)
    for _ in range(model.num_layers):  # equal blocks: giving each to the lightest stage is optimal
        load, stage = lightest[0]
        counts[stage] += 1
        heapreplace(lightest, (load + block, stage))
    return counts


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches of one optimizer step on one rank."""
    training = config.training
    return training.global_batch_size // (training.micro_batch_size * data_parallel_size(config, world_size))


def hash_base(config: RunConfig) -> int:
    """p of the polynomial that hashes n-grams."""
    return config.over_encoding.hash_base or config.model.vocab_size


def has_word_embedding(over: OverEncodingConfig) -> bool:
    """Whether the model's input has a 1-gram embedding, which only a study of n-grams alone leaves out."""
    return over.word_embedding or not over.enabled


def row_width(model: ModelConfig, over: OverEncodingConfig) -> int:
    """w, values per row."""
    return over.row_width or model.hidden_size // ((over.ngram_order - 1) * over.num_slices)


def table_rate_factor(config: RunConfig) -> float:
    """The rows' learning rate over the dense one."""
    over = config.over_encoding
    if over.learning_rate_factor is not None:
        return over.learning_rate_factor
    default: dict[RowRule, float] = {"rowwise_adagrad": 10.0, "rowwise_adam": 1.0, "adam": 1.0, "sgd": 1.0}
    return default[over.optimizer]


def later_losses(config: RunConfig) -> dict[str, int]:
    """The losses of heads that predict later tokens, by name: how many tokens after the next one each predicts, 1 or more."""
    tables = {f"over_decoding_{ahead}": ahead - 1 for ahead in range(2, config.over_decoding.num_tokens + 1)}
    depths = {f"multi_token_{depth}": depth for depth in range(1, config.multi_token_prediction.depth + 1)}
    return tables | depths


def without_later_heads(config: RunConfig) -> RunConfig:
    """The same configuration of the main model alone."""
    off = {"over_decoding": OverDecodingConfig(), "multi_token_prediction": MultiTokenPredictionConfig()}
    return config.model_copy(update=off)


def with_frozen_tables(config: RunConfig) -> RunConfig:
    """The same configuration with n-gram rows that take no update."""
    over = config.over_encoding
    added = [group.model_copy(update={"frozen": True}) for group in over.added]
    return config.model_copy(update={"over_encoding": over.model_copy(update={"frozen": True, "added": added})})


def is_trained(train_only: str | None, parameter: str) -> bool:
    """Whether training moves the dense parameter of this name. train_only: the value of training.train_only."""
    return train_only is None or parameter.startswith(("over_decoding.", "multi_token."))


def further_tokens(config: RunConfig) -> int:
    """D', how many tokens after the next one the heads look ahead; 0 without such heads."""
    return max(config.multi_token_prediction.depth, config.over_decoding.num_tokens - 1)


def tokens_per_step(config: RunConfig) -> int:
    return config.training.global_batch_size * config.data.seq_length


def train_iters(config: RunConfig) -> int:
    """Optimizer steps of the whole run; a length in tokens is rounded up to whole steps."""
    if config.training.train_iters is not None:
        return config.training.train_iters
    assert config.training.train_tokens is not None
    return -(-config.training.train_tokens // tokens_per_step(config))
