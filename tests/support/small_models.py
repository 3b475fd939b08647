"""Small models with random weights, of every kind that decoding treats in its own way."""

from typing import Any

import pytest
import torch

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.inference.loading import TrainedModel
from support.assembling import cpu_model, cpu_reader

VOCAB, CONTEXT = 61, 40
CPU = torch.device("cpu")


class Letters:
    """A tokenizer of characters."""

    vocab_size = VOCAB
    eod_id = 0

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) % (VOCAB - 1) for letter in text]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(64 + token) for token in tokens)

    def undecided(self, token: int) -> bool:
        return False

    def fingerprint(self) -> str:
        return "letters"


class Endless:
    """A tokenizer whose end of document no model writes: no text ends by itself."""

    eod_id = -5

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


LLAMA = {"norm_placement": "pre", "qk_norm": "none", "head_size": 16, "init_std": 0.3,
         "rope_scaling": {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 8}}  # fmt: skip
OLMO3 = {"sliding_window": 3, "full_attention_interval": 2,
         "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}}  # fmt: skip
OLMOE = {"norm_placement": "pre", "num_experts": 6, "num_experts_per_token": 2, "intermediate_size": 16}
WITHIN = "Olmoe, within documents"
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "over-encoded": ({}, True),
    "Llama": (LLAMA, False),
    "Olmo3, over-encoded": (OLMO3, True),
    WITHIN: (OLMOE, False),
}


@pytest.fixture(params=KINDS)
def small_model(request: pytest.FixtureRequest) -> TrainedModel:
    """Each kind in turn: windows, experts, documents, tables."""
    return build_small_model(request.param)


def build_small_model(kind: str, **sections: Any) -> TrainedModel:
    """A model of a kind; sections: further ones of its configuration."""
    model_keys, over_encoded = KINDS[kind]
    over = {"enabled": True, "ngram_order": 3, "num_slices": 1, "table_rows": 1000, "init_std": 0.5, "combine": "sum"}
    over |= {"row_width": 16, "added": [{"orders": [5, 2], "table_rows": 700}]}
    config = RunConfig.model_validate(
        {
            "model": {
                "vocab_size": VOCAB,
                "hidden_size": 48,
                "intermediate_size": 64,
                "num_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "init_std": 0.3,
            }
            | model_keys,
            "over_encoding": over if over_encoded else {},
            "tokenizer": {"path": "none"},
            "data": {
                "train": "none",
                "seq_length": CONTEXT,
                "document_attention": "within" if kind == WITHIN else "across",
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {
                "output_directory": "none",
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "train_iters": 1,
                "precision": "fp32",
            },
            **sections,
        }
    )
    model = cpu_model(config, eod_id=Letters.eod_id).eval()
    tables = cpu_reader(config, 0) if config.over_encoding.enabled else None
    return TrainedModel(config=config, model=model, tables=tables, tokenizer=Letters(), step=0)


@torch.no_grad()
def full_logits(trained: TrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    fetched = trained.fetch_rows(tokens)
    return trained.model.logits(tokens, fetched)
