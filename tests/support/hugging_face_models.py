"""Small random models of transformers' families in folders, with a tokenizer, and over-encoded runs of ours."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
)

from overtok_megatron.checkpoint.weights_only import write_weights
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.interchange.sample_text import SAMPLE_TEXT
from support.assembling import cpu_model, cpu_tables

CPU = torch.device("cpu")
VOCAB = 310  # more than the tokenizer's, as in many a model
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None,
    "max_position_embeddings": 128, "initializer_range": 0.05,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def random_models() -> dict[str, PreTrainedModel]:
    """One model of each family, with the features that only this family has; weights of norms differ from one."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    made = {
        "olmo2": Olmo2ForCausalLM(Olmo2Config(**SHAPE)),
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3)),
        "olmo3": Olmo3ForCausalLM(
            Olmo3Config(**SHAPE, sliding_window=8, rope_parameters={"full_attention": YARN, "sliding_attention": PLAIN})
        ),
        "olmoe": OlmoeForCausalLM(OlmoeConfig(**SHAPE, **experts)),
    }
    with torch.no_grad():
        for model in made.values():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.normal_(1.0, 0.2)
    return {name: model.eval() for name, model in made.items()}


def save_tokenizer(path: Path) -> None:
    """A byte-level tokenizer.json of 300 tokens."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=letters, special_tokens=["</s>"], show_progress=False
    )
    made.train_from_iterator([SAMPLE_TEXT], trainer)
    made.save(str(path))


def over_encoded_run(
    run: Path, tokenizer: Path, model: dict[str, Any], over: dict[str, Any], data: dict[str, Any] | None = None
) -> RunConfig:
    """A run of random weights and rows, of every kind that is not zero; plain where over says {"enabled": False}."""
    kind = "hugging_face" if tokenizer.suffix == ".json" else "sentencepiece"
    eod = "</s>" if kind == "hugging_face" else None
    loaded = load_tokenizer(kind, tokenizer, eod)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_layers": 2, "num_attention_heads": 4, "init_std": 0.2}
    config = RunConfig.model_validate(
        {
            "model": shape | {"vocab_size": loaded.vocab_size} | model,
            "over_encoding": {"enabled": True, "table_rows": 5003, "init_std": 0.5, "collision_check": "warn"} | over
            if over.get("enabled", True)
            else over,
            "tokenizer": {"type": kind, "path": str(tokenizer), "eod_token": eod},
            "data": {"train": "none", "seq_length": 64} | (data or {}),
            "optimizer": {"learning_rate": 1e-3},
            "training": {"output_directory": str(run), "micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1,
                         "precision": "fp32"},
        }
    )  # fmt: skip
    built = cpu_model(config)
    dense = ((name, weight.detach()) for name, weight in built.named_parameters())
    identity = {"eod_id": loaded.eod_id, "tokenizer_fingerprint": loaded.fingerprint()}
    if not config.over_encoding.enabled:
        write_weights(run, config, dense, (), **identity)
        return config
    tables = cpu_tables(config, loaded.eod_id)
    rows = {name: column for name, column in tables.columns().items() if name in ("weight", "scale")}
    half = rows["weight"].shape[0] // 2
    pieces = [(start, {name: column[start:stop].clone() for name, column in rows.items()})
              for start, stop in ((0, half), (half, rows["weight"].shape[0]))]  # fmt: skip
    write_weights(run, config, dense, pieces, **identity)
    return config
