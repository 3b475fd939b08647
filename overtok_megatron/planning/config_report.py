"""What `overtok config` prints: every value with where it came from, and everything that follows from them."""

import json

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
    """The resolved configuration as text: `key  value  where from`, then derived sizes, counts, bytes and DeepSpeed's JSON."""
    config = loaded.config
    rows = []
    for section, values in config.model_dump(mode="json").items():
        if values:
            rows += [
                (f"{section}.{name}", json.dumps(value, ensure_ascii=False), loaded.locate(f"{section}.{name}"))
                for name, value in values.items()
            ]
    count, size = parameter_counts(config), bytes_per_rank(config, world_size)
    steps = train_iters(config)
    derived = [
        ("ranks", f"{world_size} = {_axes(config, world_size)}"),
        ("blocks a pipeline stage", ", ".join(map(str, blocks_per_stage(config)))),
        ("micro-batches a step", str(accumulation_steps(config, world_size))),
        ("tokens a step", f"{tokens_per_step(config):,}"),
        ("steps", f"{steps:,}"),
        ("tokens in all", f"{steps * tokens_per_step(config):,}"),
        (
            "parameters, dense",
            f"{count.dense:,} (blocks {count.blocks:,}, embedding {count.embedding:,}, "
            f"head {count.head:,}, n-gram projection {count.encoder:,})",
        ),
        ("parameters, active", f"{count.active:,} dense ones take part in a token"),
        ("parameters, n-gram tables", f"{count.tables:,}"),
        (
            "bytes a rank",
            f"{size.total:,} (weights {size.weights:,}, gradients {size.gradients:,}, optimizer "
            f"{size.optimizer:,}, table rows {size.table_rows:,}, table state {size.table_state:,}), activations apart",
        ),
        ("FLOPs a token", f"{flops_per_token(config):.4g} forward and backward"),
    ]
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{key:<{wide[0]}}  {value:<{wide[1]}}  {place}" for key, value, place in rows]
    label = max(len(name) for name, _ in derived)
    lines += ["", *(f"{name:<{label}}  {value}" for name, value in derived)]
    return "\n".join([*lines, "", "DeepSpeed:", json.dumps(derive(config, world_size), indent=2)])


def _axes(config: RunConfig, world_size: int) -> str:
    parallel = config.parallel
    sizes = {
        "pipeline": parallel.pipeline_parallel_size,
        "data": data_parallel_size(config, world_size),
        "context": parallel.context_parallel_size,
        "tensor": parallel.tensor_parallel_size,
    }
    return " x ".join(f"{size} {axis}" for axis, size in sizes.items() if size > 1 or axis == "data")
