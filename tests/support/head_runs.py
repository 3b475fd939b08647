"""Tiny trained models of six kinds, each with over-decoding tables and multi-token layers, on one tokenizer and corpus."""

from pathlib import Path
from typing import Any

import torch

from overtok_megatron.cli import main
from overtok_megatron.config.loading import load_config
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from support.distributed_harness import run_ranks
from support.trained_runs import VOCAB, tiny_run_config

HEADS = {
    "over_decoding": {"num_tokens": 3, "loss_weights": [0.3, 0.3]},
    "multi_token_prediction": {"depth": 2, "loss_weight": 0.3},
}
GROWN = "grown"
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {  # keys of the model, and of its tables
    "plain": ({}, None),
    "over-encoded": ({}, {}),
    "experts": ({"norm_placement": "pre", "num_experts": 4, "num_experts_per_token": 2, "intermediate_size": 24}, None),
    "sliding window": ({"sliding_window": 8, "full_attention_interval": 2}, {}),
    "int8 rows": ({}, {"row_dtype": "int8"}),
}


def head_run_config(folder: Path, kind: str, steps: int) -> RunConfig:
    model_keys, over_keys = KINDS[kind]
    values = tiny_run_config(folder, "fp32", over=over_keys is not None).model_dump()
    values["model"] |= {"num_key_value_heads": 1} | model_keys
    values["over_encoding"] |= over_keys or {}
    values["training"] |= {
        "output_directory": str(folder / kind),
        "train_iters": steps,
        "validation_interval": None,
        "micro_batch_size": 8,
    }
    return RunConfig.model_validate({**values, **HEADS})


def _train(folder: Path, kinds: list[str], steps: int) -> None:
    from overtok_megatron.training.trainer import Trainer

    def run(config: RunConfig) -> None:
        Path(config.training.output_directory).mkdir(exist_ok=True)
        assert Trainer(config, device=torch.device("cpu"), num_threads=1).run()

    for kind in kinds:
        if kind != GROWN:
            run(head_run_config(folder, kind, steps))
            continue
        output = folder / kind
        grow = ("grow", str(folder / "over-encoded"), f"training.train_iters={steps // 2}", "--output", str(output))
        assert main([*grow, "--tables", "orders=4,rows=9973"]) == 0
        run(load_config(output / "config.yaml").config)


def train_head_runs(folder: Path, kinds: list[str], steps: int) -> None:
    """Train runs in folder/<kind>; `grown` comes behind `over-encoded`, from which it is made."""
    files = sotu_files()
    train_sentencepiece(files[:6], VOCAB, folder / "tokenizer.model")
    tokenizer = load_tokenizer("sentencepiece", folder / "tokenizer.model")
    prepare(files[:6], folder / "train", tokenizer)
    prepare(files[6:8], folder / "validation", tokenizer)
    run_ranks(1, _train, folder, kinds, steps, timeout=1500)


def prompts_of(folder: Path, count: int) -> list[list[int]]:
    """Prompts of 1 to 20 tokens, from a text that was not trained on."""
    tokenizer = load_tokenizer("sentencepiece", folder / "tokenizer.model")
    tokens = tokenizer.encode(sotu_files()[8].read_text(encoding="utf-8")[:60_000])
    assert len(tokens) > 23 * count
    return [tokens[23 * index : 23 * index + 1 + 7 * index % 20] for index in range(count)]
