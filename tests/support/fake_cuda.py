"""Forward passes on CUDA tensors that hold nothing, for a CUDA build of torch on a machine without a GPU.

Run by test_cuda_build.py in an environment of its own. Under torch's FakeTensorMode an operator whose arguments lie on two
devices raises, as it would on a GPU. Backward passes and kernels of Triton need a driver: tests/gpu has those.
"""

from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.kernels import flex_attention
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.documents import Documents
from overtok_megatron.kernels.dtypes import DTYPES
from overtok_megatron.model.assembly import build_layers
from overtok_megatron.model.transformer import Transformer
from overtok_megatron.ngram.building import build_tables

CUDA = torch.device("cuda", 0)
TABLES = {
    "enabled": True,
    "table_rows": 53,
    "init_std": 0,
}  # initial rows are drawn by NumPy, which knows no fake tensors
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "tied": {"model": {"tie_word_embeddings": True}},
    "over-encoded": {"over_encoding": TABLES},
    "int8 rows": {"over_encoding": TABLES | {"row_dtype": "int8"}},
    "added and frozen tables": {
        "over_encoding": TABLES
        | {"frozen": True, "row_width": 5, "added": [{"orders": [2, 5], "num_slices": 2, "table_rows": 9}]}
    },
    "n-grams across documents": {"over_encoding": TABLES | {"boundary": "ignore", "combine": "mean"}},
    "attention within documents": {"over_encoding": TABLES, "data": {"document_attention": "within"}},
    "grouped queries": {"model": {"num_key_value_heads": 2}},
    "Llama": {"model": {"norm_placement": "pre", "qk_norm": "none", "head_size": 20}},
    "sliding window": {"model": {"num_layers": 4, "sliding_window": 3, "full_attention_interval": 2}},
    "recomputation": {"training": {"recompute": "full"}},
    "float32": {"over_encoding": TABLES, "training": {"precision": "fp32"}},
}


def configuration(changes: dict[str, dict[str, Any]]) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_layers": 2, "num_attention_heads": 4},
        "over_encoding": {},
        "tokenizer": {"path": "none"},
        "data": {"train": "none", "seq_length": 8},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"output_directory": "none", "micro_batch_size": 2, "global_batch_size": 2, "train_iters": 1,
                     "kernels": "torch"},
    }  # fmt: skip
    return RunConfig.model_validate({name: section | changes.get(name, {}) for name, section in values.items()})


def forward(config: RunConfig) -> None:
    dtype = DTYPES[config.training.precision]
    torch.set_default_dtype(dtype)
    kernels = choose_kernels(config.training.kernels, CUDA)
    layers = build_layers(
        config.model,
        config.over_encoding,
        kernels=kernels,
        recompute=config.training.recompute,
    )
    torch.set_default_dtype(torch.float32)
    within = config.data.document_attention == "within"
    model = Transformer(layers, eod_id=0 if within else None)
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    fetched = None
    if config.over_encoding.enabled:
        tables = build_tables(config, 0, device=CUDA, kernels=kernels)
        # Planned on the device: the thread that plans a step on the host knows no fake tensors.
        fetched = tables.fetch_row_ids(tables.row_ids(tokens[:, :-1]), training=True)
        assert fetched.rows.index is not None, "one process took the branch of several"
        assert fetched.slots.device == fetched.rows.stored.weight.device == CUDA
    result = model(tokens[:, :-1], fetched, tokens[:, 1:])
    assert result.objective.device == result.main_loss.device == CUDA
    assert model.logits(tokens[:, :-1], fetched).shape == (2, 8, 101)


def flex() -> None:
    """FlexAttention as `auto` calls it, traced but not lowered to Triton: on one device, and without waiting for it."""
    causal_attention = choose_kernels("auto", CUDA).causal_attention
    assert causal_attention is flex_attention.causal_attention
    for length in (300, 513, 64):
        q, k, v = (torch.empty(2, length, heads, 32).transpose(1, 2) for heads in (4, 2, 2))
        documents = Documents(torch.zeros(2, length, dtype=torch.int64))
        for window, within in ((7, None), (None, documents), (7, documents)):
            out = causal_attention(q, k, v, window, within)
            assert out.shape == q.shape and out.device == CUDA


def main() -> None:
    assert torch.version.cuda is not None, "not a CUDA build of torch"
    for name, changes in CASES.items():
        with FakeTensorMode(shape_env=ShapeEnv()), torch.device(CUDA), torch.no_grad():
            forward(configuration(changes))
        print(name)
    traced = torch.compile(torch.nn.attention.flex_attention.flex_attention, fullgraph=True, backend="aot_eager")
    with (
        mock.patch.object(flex_attention, "_compiled", return_value=traced),
        FakeTensorMode(shape_env=ShapeEnv()),
        torch.device(CUDA),
        torch.no_grad(),
    ):
        flex()
    print("FlexAttention")


if __name__ == "__main__":
    main()
