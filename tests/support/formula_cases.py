"""A tiny over-encoded run of four steps with any settings, and its tokens."""

from dataclasses import dataclass, field
from typing import Any

import torch

from overtok_megatron.config.schema import RunConfig

EOD = 3
STEPS = 4
SEQ = 12
BATCH = 8


@dataclass(frozen=True)
class Case:
    name: str
    over: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def case_config(case: Case) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"vocab_size": 59, "hidden_size": 48, "intermediate_size": 64, "num_layers": 2,
                      "num_attention_heads": 4, "num_key_value_heads": 2, "init_std": 0.05} | case.model,
            "over_encoding": {"enabled": True, "ngram_order": 3, "num_slices": 2, "table_rows": 97, "pad_id": 1,
                              "collision_check": "warn", "learning_rate_factor": 2.5, "optimizer": "adam",
                              "row_dtype": "float32", "state_dtype": "float32"} | case.over,
            "tokenizer": {"path": "none"},
            "data": {"train": "none", "seq_length": SEQ},
            "parallel": {"zero_stage": 0} | case.parallel,
            "optimizer": {"learning_rate": 3e-3, "gradient_clipping": 0.5} | case.optimizer,
            "training": {"output_directory": "none", "micro_batch_size": 2, "global_batch_size": BATCH, "train_iters": STEPS,
                         "precision": "fp32"} | case.training,
        }
    )  # fmt: skip


def stream(vocab_size: int) -> torch.Tensor:
    """[steps, batch, s + 1]: repeated n-grams and ends of documents in it."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, vocab_size, (STEPS, BATCH, SEQ + 1), generator=generator)
    common = torch.randint(0, 6, tokens.shape, generator=generator)
    return torch.where(torch.rand(tokens.shape, generator=generator) < 0.6, common, tokens)
