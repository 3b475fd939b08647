"""Logits, loss and every gradient against Hugging Face's Olmo2ForCausalLM on the same weights, float32."""

import pytest
import torch
from reference import hugging_face_model, hugging_face_names

from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.model.assembly import build_layers
from overtok_megatron.model.transformer import Transformer


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients(kernels: str, kv_heads: int, tied: bool) -> None:
    config = ModelConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    chosen = choose_kernels(kernels, torch.device("cpu"))
    layers = build_layers(config, OverEncodingConfig(), kernels=chosen)
    layers.reset(seed=1, std=0.05)
    model = Transformer(layers)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.normal_(1.0, 0.2)
    theirs = hugging_face_model(config)
    names = hugging_face_names(model)
    theirs.load_state_dict(names)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 101, (3, 70), generator=generator)
    targets = torch.randint(0, 101, (3, 70), generator=generator)
    targets[0, :9] = -100
    logits = theirs(tokens).logits
    torch.testing.assert_close(model.logits(tokens), logits, rtol=1e-5, atol=1e-5)

    objective, cross_entropy = model(tokens, None, targets)
    objective.backward()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    assert objective.item() == pytest.approx(expected.item(), rel=1e-6)
    assert cross_entropy.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = dict(theirs.named_parameters())
    for name, weight in names.items():
        if name in parameters:
            grad, wanted = weight.grad, parameters[name].grad
            assert (grad - wanted).norm() < 1e-5 * wanted.norm(), name
