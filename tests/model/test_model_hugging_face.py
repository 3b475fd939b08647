"""Logits, loss and every gradient against Hugging Face's classes on the same weights, float32."""

from typing import Any

import pytest
import torch
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.model.assembly import build_layers
from overtok_megatron.model.transformer import Transformer
from support.reference import hugging_face_model, hugging_face_names

LLAMA = {"norm_placement": "pre", "qk_norm": "none", "norm_epsilon": 1e-5}
LLAMA3 = {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 24}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
OLMO3 = {"sliding_window": 16, "full_attention_interval": 2}
OLMOE = {"norm_placement": "pre", "num_experts": 8, "num_experts_per_token": 3, "intermediate_size": 24}
CASES: dict[str, dict[str, Any]] = {
    "Olmo2": {"num_key_value_heads": 4},
    "Olmo2, grouped": {},
    "Olmo2, grouped, tied": {"tie_word_embeddings": True},
    "Llama": LLAMA | {"rope_theta": 10000.0},
    "Llama, tied, wide heads, llama3": LLAMA | {"tie_word_embeddings": True, "head_size": 24, "rope_scaling": LLAMA3},
    "Llama, linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "Llama, llama3 otherwise": LLAMA
    | {"rope_scaling": LLAMA3 | {"low_freq_factor": 0.5, "high_freq_factor": 2.0, "factor": 8.0}},
    "Olmo3": OLMO3,
    "Olmo3, yarn": OLMO3 | {"rope_scaling": YARN},
    "Olmo3, yarn otherwise, a pattern": {
        "sliding_window": 7,
        "attention_pattern": ["full", "sliding", "sliding"],
        "rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3},
    },
    "Olmo3, every layer slides": {"sliding_window": 2},
    "Olmoe": OLMOE,
    "Olmoe, tied, weights to 1": OLMOE | {"tie_word_embeddings": True, "normalize_expert_weights": True},
    "Olmoe, all experts": OLMOE | {"num_experts": 3},
}


def configuration(name: str) -> ModelConfig:
    shape = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "router_aux_loss_weight": 0.0}  # fmt: skip
    return ModelConfig.model_validate(shape | CASES[name])


def built(config: ModelConfig, kernels: str) -> Transformer:
    layers = build_layers(config, OverEncodingConfig(), kernels=choose_kernels(kernels, torch.device("cpu")))
    layers.reset(seed=1, std=0.05)
    model = Transformer(layers)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.normal_(1.0, 0.2)
    return model


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(kernels: str, name: str) -> None:
    config = configuration(name)
    model = built(config, kernels)
    theirs = hugging_face_model(config)
    theirs.load_state_dict(hugging_face_names(model))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 101, (3, 70), generator=generator)
    targets = torch.randint(0, 101, (3, 70), generator=generator)
    targets[0, :9] = -100
    logits = theirs(tokens).logits
    torch.testing.assert_close(model.logits(tokens), logits, rtol=1e-5, atol=1e-5)

    objective, cross_entropy, *_ = model(tokens, None, targets)
    objective.backward()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    assert objective.item() == pytest.approx(expected.item(), rel=1e-6)
    assert cross_entropy.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = dict(theirs.named_parameters())
    for name, grad in hugging_face_names(model, lambda weight: weight.grad).items():
        if name in parameters:
            wanted = parameters[name].grad
            assert (grad - wanted).norm() < 1e-5 * wanted.norm(), name


def test_the_routers_loss() -> None:
    """Of each layer alone Hugging Face's function over k, averaged; and the squared log-partition; with their gradients."""
    config = configuration("Olmoe").model_copy(update={"router_aux_loss_weight": 0.3, "router_z_loss_weight": 0.2})
    model = built(config, "torch")
    theirs = hugging_face_model(config)
    theirs.load_state_dict(hugging_face_names(model))
    tokens = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(0))
    objective, cross_entropy, *_ = model(tokens, None, tokens)
    objective.backward()
    result = theirs(tokens, output_router_logits=True)
    ours = torch.nn.functional.cross_entropy(result.logits.flatten(0, 1), tokens.flatten())
    for layer in result.router_logits:
        ours = ours + 0.3 / 3 * load_balancing_loss_func((layer,), 8, 3) / 3
        ours = ours + 0.2 / 3 * layer.logsumexp(-1).square().mean()
    (ours * tokens.numel()).backward()
    assert objective.item() == pytest.approx(ours.item() * tokens.numel(), rel=1e-6)
    assert objective.item() > cross_entropy.item() + 1.0
    parameters = dict(theirs.named_parameters())
    for name, grad in hugging_face_names(model, lambda weight: weight.grad).items():
        assert (grad - parameters[name].grad).norm() < 1e-5 * parameters[name].grad.norm(), name
