"""Layers that are trained in compiled halves against torch's operators, on the CPU; and which layers are not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, Recompute
from overtok_megatron.kernels.choice import Kernels, choose_kernels
from overtok_megatron.kernels.compiled_layers import CompiledLayers
from overtok_megatron.model.assembly import build_layers
from overtok_megatron.model.transformer import Transformer

CPU = torch.device("cpu")
LLAMA = {"norm_placement": "pre", "qk_norm": "none"}
END = 3  # the token that ends a document


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    return choose_kernels("compile", CPU)


def model(kernels: Kernels, recompute: Recompute = "none", *, eod_id: int | None = None, **changes: Any) -> Transformer:
    values = {"vocab_size": 59, "hidden_size": 40, "intermediate_size": 56, "num_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2} | changes  # fmt: skip
    layers = build_layers(
        ModelConfig.model_validate(values), OverEncodingConfig(), kernels=kernels, recompute=recompute
    )
    layers.reset(seed=1, std=0.1)
    return Transformer(layers, eod_id=eod_id)


def results(trained: Transformer, tokens: Tensor) -> list[Tensor]:
    """The loss and the gradients of all weights."""
    trained.zero_grad()
    result = trained(tokens[:, :-1], None, tokens[:, 1:])
    result.objective.backward()
    return [result.main_loss.detach(), *(weight.grad for weight in trained.parameters() if weight.grad is not None)]


def made_tokens() -> Tensor:
    return torch.randint(0, 59, (3, 14), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("changes", "recompute", "eod_id"),
    [
        ({}, "none", None),
        (LLAMA, "full", None),
        *(
            pytest.param(changes, recompute, eod_id, marks=pytest.mark.ci)
            for changes in ({"norm_placement": "pre"}, {"qk_norm": "none"}, {"sliding_window": 5}, {"num_key_value_heads": 4})
            for recompute, eod_id in (("none", END), ("selective", None), ("full", END))
        ),
    ],
)  # fmt: skip
def test_losses_and_gradients_are_those_of_torch(
    compiled: Kernels, changes: dict[str, Any], recompute: Recompute, eod_id: int | None
) -> None:
    """float32: the loss to 1e-6, each gradient to 1e-5 of its largest value."""
    ours, theirs = (model(kernels, recompute, eod_id=eod_id, **changes) for kernels in (compiled, Kernels()))
    assert all(block.halves is not None for block in ours.blocks)  # type: ignore[union-attr]
    found, wanted = results(ours, made_tokens()), results(theirs, made_tokens())
    assert abs(found[0] / wanted[0] - 1) < 1e-6
    for mine, exact in zip(found, wanted, strict=True):
        assert (mine - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("changes", [{}, pytest.param(LLAMA, marks=pytest.mark.ci)])
def test_bfloat16_is_as_near_to_exact_as_torch(compiled: Kernels, changes: dict[str, Any]) -> None:
    """Against float32 with the same bfloat16 weights: at most a quarter further away than torch's operators."""
    exact_model = model(Kernels(), **changes).bfloat16().float()
    exact = results(exact_model, made_tokens())
    away = []
    for kernels in (compiled, Kernels()):
        found = results(model(kernels, **changes).bfloat16(), made_tokens())
        distances = [
            float((mine.float() - wanted).norm() / wanted.norm()) for mine, wanted in zip(found, exact, strict=True)
        ]
        away.append(distances)
    for ours, theirs in zip(*away, strict=True):
        assert ours <= 1.25 * theirs + 2e-3


def test_layers_and_models_of_one_shape_share_what_is_compiled(compiled: Kernels) -> None:
    """Two functions forward; another shape of batch is two more; without gradients nothing is run in halves."""
    tokens = made_tokens()
    changes = {"hidden_size": 24, "num_layers": 3, "intermediate_size": 32, "num_attention_heads": 2}
    trained = model(compiled, **changes)
    results(trained, tokens)
    before = counters["stats"]["unique_graphs"]
    results(trained, tokens.flip(0))
    results(model(compiled, **changes), tokens)
    assert counters["stats"]["unique_graphs"] == before
    results(trained, tokens[:2])
    assert counters["stats"]["unique_graphs"] == before + 2


def test_where_layers_run_pass_by_pass(compiled: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """With experts, with weights that ZeRO 3 gathers as their module is called, without gradients, and in torch's operators."""

    def forbidden(*_: Any) -> None:
        raise AssertionError("was run in halves")

    with monkeypatch.context() as patch:
        patch.setattr(CompiledLayers, "before_core", forbidden)
        with torch.no_grad():
            model(compiled).logits(made_tokens())
        for trained in (model(compiled, num_experts=4, num_experts_per_token=2), model(Kernels())):
            assert all(block.halves is None for block in trained.blocks)  # type: ignore[union-attr]
        sections = ModelConfig(vocab_size=59, hidden_size=8, intermediate_size=8, num_layers=1, num_attention_heads=2)
        layers = build_layers(sections, OverEncodingConfig(), kernels=compiled, weights_on_call=True)
        assert all(block.halves is None for block in layers.blocks.values())
        with pytest.raises(AssertionError, match="in halves"):
            results(model(compiled), made_tokens())


def test_no_gradient_of_attention_is_copied(compiled: Kernels) -> None:
    """AOTAutograd copies gradients that do not lie in memory as it expects: torch 2.11 did so with those of q, k and v."""
    trained = model(replace(compiled, causal_attention=Kernels().causal_attention), num_key_value_heads=4)
    tokens = made_tokens()
    results(trained, tokens)
    result = trained(tokens[:, :-1], None, tokens[:, 1:])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result.objective.backward()
    copies = sum(event.count for event in profiler.key_averages() if event.key == "aten::clone")
    assert copies < 2, f"{copies} copies in two layers"
