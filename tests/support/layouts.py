"""A small run on any layout: its configuration, its tokens, and the reference that it has to equal."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.config.derived import further_tokens
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.training.engine import TrainingEngine
from support.reference import Reference

CPU = torch.device("cpu")
EOD, VOCAB, SEQ, BATCH, STEPS = 3, 59, 12, 12, 20
TIED = {"tie_word_embeddings": True}
WITHIN = {"document_attention": "within"}
LLAMA = {"norm_placement": "pre", "qk_norm": "none", "head_size": 8, "init_std": 0.3,
         "rope_scaling": {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 8}}  # fmt: skip
OLMO3 = {"sliding_window": 5, "full_attention_interval": 2,
         "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}}  # fmt: skip
OLMOE = {"norm_placement": "pre", "init_std": 0.3, "num_experts": 6, "num_experts_per_token": 2, "intermediate_size": 16,
         "router_aux_loss_weight": 0.1, "router_z_loss_weight": 0.01}  # fmt: skip
MANY = OLMOE | {"num_experts": 40, "num_experts_per_token": 1, "num_layers": 2}  # some are without a token in each step


@dataclass(frozen=True)
class Layout:
    """A layout, and what of the model and the run differs from the usual case."""

    parallel: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    over: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)  # other sections, whole


KEYS = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "cp": "context_parallel_size",
    "z": "zero_stage",
}


def layout(short: str, *, micro: int = 2, **others: dict[str, Any]) -> Layout:
    """`tp2 pp2 z1 sp offload` in the schema's words; `micro` sequences per micro-batch."""
    parallel: dict[str, Any] = {}
    for word in short.split():
        name = word.rstrip("0123456789")
        if name in KEYS:
            parallel[KEYS[name]] = int(word.removeprefix(name))
        else:
            parallel |= {"sp": {"sequence_parallel": True}, "offload": {"offload_optimizer": "cpu"}}[name]
    training = {"micro_batch_size": micro, **others.pop("training", {})}
    return Layout(parallel, training=training, **others)


def experts(short: str, *, model: dict[str, Any] = OLMOE, **others: Any) -> Layout:
    """A layout of a mixture. Adam's epsilon keeps it from turning rounding noise into steps, which would change choices."""
    return layout(short, model=model, optimizer={"eps": 1e-3}, **others)


def layout_config(case: Layout) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_layers": 4,
                      "num_attention_heads": 8, "num_key_value_heads": 4, "init_std": 0.05} | case.model,
            "over_encoding": {"enabled": True, "ngram_order": 3, "num_slices": 2, "table_rows": 97, "pad_id": 1,
                              "collision_check": "warn", "learning_rate_factor": 2.5, "optimizer": "sgd",
                              "row_dtype": "float32", "state_dtype": "float32",
                              "combine": "sum"} | case.over,
            "tokenizer": {"path": "none"},
            "data": {"train": "none", "seq_length": SEQ} | case.data,
            "parallel": {"zero_stage": 0} | case.parallel,
            "optimizer": {"learning_rate": 3e-3, "gradient_clipping": 0.5} | case.optimizer,
            "training": {"output_directory": "none", "micro_batch_size": 2, "global_batch_size": BATCH, "train_iters": STEPS,
                         "precision": "fp32", "kernels": "torch"} | case.training,
        }
        | case.sections
    )  # fmt: skip


def stream(further: int = 0) -> Tensor:
    """[steps, batch, s + 1 + further]: repeated n-grams and ends of documents in it.

    Whatever `further` is, the first s + 1 tokens are the same. Of some samples the stream ends behind them, or later, before
    the last token.
    """
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCAB, (STEPS, BATCH, SEQ + 1), generator=generator)
    common = torch.randint(0, 6, tokens.shape, generator=generator)
    tokens = torch.where(torch.rand(tokens.shape, generator=generator) < 0.6, common, tokens)
    behind = torch.randint(0, 9, (STEPS, BATCH, further), generator=generator)
    known = torch.randint(0, 4 * (further + 1), (STEPS, BATCH, 1), generator=generator)
    return torch.cat([tokens, torch.where(torch.arange(further) < known, behind, IGNORE_INDEX)], dim=-1)


def own_tokens(engine: TrainingEngine, batch: Tensor) -> Tensor:
    """A rank's part of a global batch [G, s + k, or more], as the loop would hand it over."""
    grid, length = engine.grid, SEQ + engine.extra_tokens
    return batch[:, :length].reshape(engine.num_micro_batches, grid.shape.data, -1, length)[:, grid.data_rank]


def reference_run(case: Layout) -> tuple[list[float], Reference]:
    config = layout_config(case)
    reference = Reference(config, EOD)
    return [reference.step(batch) for batch in stream(further_tokens(config))], reference
