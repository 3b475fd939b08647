"""What `overtok config` prints: every value with where it came from, and everything that follows from them."""

import json
from collections.abc import Sequence

from overtok_megatron.config.counts import bytes_per_rank, flops_per_token, parameter_counts
from overtok_megatron.config.deepspeed_config import derive
from overtok_megatron.config.derived import (
    accumulation_steps,
    blocks_per_stage,
    data_parallel_size,
    tokens_per_step,
    train_iters,
)
from overtok_megatron.config.loading import LoadedConfig
from overtok_megatron.config.schema import RunConfig


def describe(loaded: LoadedConfig, world_size: int) -> str:
    """The resolved configuration as text: `key  value  origin`, then derived sizes, counts, bytes and DeepSpeed's JSON."""
    deepspeed = json.dumps(derive(loaded.config, world_size), indent=2)
    parts = [_aligned(_values(loaded)), _aligned(_derived(loaded.config, world_size)), ["DeepSpeed:", deepspeed]]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _values(loaded: LoadedConfig) -> list[tuple[str, str, str]]:
    """(key, value, origin) of every key."""
    return [
        (f"{section}.{name}", json.dumps(value, ensure_ascii=False), loaded.locate(f"{section}.{name}"))
        for section, values in loaded.config.model_dump(mode="json").items()
        for name, value in values.items()
    ]


def _derived(config: RunConfig, world_size: int) -> list[tuple[str, str]]:
    """(name, value) of what follows from the configuration."""
    count, size, steps = parameter_counts(config), bytes_per_rank(config, world_size), train_iters(config)
    return [
        ("ranks", f"{world_size} = {_axes(config, world_size)}"),
        ("blocks per pipeline stage", ", ".join(map(str, blocks_per_stage(config)))),
        ("micro-batches per step", str(accumulation_steps(config, world_size))),
        ("tokens per step", f"{tokens_per_step(config):,}"),
        ("steps", f"{steps:,}"),
        ("tokens in all", f"{steps * tokens_per_step(config):,}"),
        (
            "parameters, dense",
            f"{count.dense:,} (blocks {count.blocks:,}, embedding {count.embedding:,}, "
            f"head {count.head:,}, n-gram projection {count.encoder:,}"
            + (f", over-decoding {count.over_decoding:,}" if count.over_decoding else "")
            + (f", multi-token prediction {count.multi_token:,})" if count.multi_token else ")"),
        ),
        ("parameters, active", f"{count.active:,} dense ones take part in a token"),
        ("parameters, n-gram tables", f"{count.tables:,}"),
        (
            "bytes per rank",
            f"{size.total:,} (weights {size.weights:,}, gradients {size.gradients:,}, optimizer "
            f"{size.optimizer:,}, table rows {size.table_rows:,}, table state {size.table_state:,}), activations apart",
        ),
        ("FLOPs per token", f"{flops_per_token(config):.4g} forward and backward"),
    ]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, every column but the last as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]


def _axes(config: RunConfig, world_size: int) -> str:
    parallel = config.parallel
    sizes = {
        "pipeline": parallel.pipeline_parallel_size,
        "data": data_parallel_size(config, world_size),
        "context": parallel.context_parallel_size,
        "tensor": parallel.tensor_parallel_size,
    }
    return " x ".join(f"{size} {axis}" for axis, size in sizes.items() if size > 1 or axis == "data")
