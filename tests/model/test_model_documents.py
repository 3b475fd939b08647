"""Attention within documents against Hugging Face's classes on every document alone, float32."""

import pytest
import torch

from overtok_megatron.config.schema import ModelConfig, OverEncodingConfig, Recompute
from overtok_megatron.kernels import reference
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.kernels.reference import document_mask
from overtok_megatron.model.assembly import build_layers
from overtok_megatron.model.documents import document_ids
from overtok_megatron.model.transformer import Transformer
from support.reference import hugging_face_model, hugging_face_names

CPU, VOCAB, END = torch.device("cpu"), 101, 7


def packed() -> torch.Tensor:
    """[3, 70] with ends at the start, in a row, inside and as the last token; one sample is a single open document."""
    tokens = torch.randint(END + 1, VOCAB, (3, 70), generator=torch.Generator().manual_seed(0))
    for sample, ends in enumerate(([0, 22, 23, 50], [9, 69])):
        tokens[sample, ends] = END
    return tokens


def documents_of(line: torch.Tensor) -> list[torch.Tensor]:
    stops = [position + 1 for position, token in enumerate(line.tolist()) if token == END]
    return [part for part in line.tensor_split(stops) if len(part)]


def test_an_end_is_of_the_document_that_it_ends() -> None:
    assert document_ids(torch.tensor([[END, 1, END, END, 2], [1, 2, 3, 4, END]]), END).tolist() == [
        [0, 1, 1, 2, 3],
        [0, 0, 0, 0, 0],
    ]


def test_a_mask_has_the_document_and_the_window() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    for window, sees in (
        (None, ["1....", "11...", "111..", "...1.", "...11", "1....", ".1...", ".11..", ".111.", ".1111"]),
        (2, ["1....", "11...", ".11..", "...1.", "...11", "1....", ".1...", ".11..", "..11.", "...11"]),
    ):
        mask = document_mask(documents, window, torch.bfloat16)
        assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bfloat16
        wanted = torch.tensor([[0.0 if sign == "1" else -torch.inf for sign in line] for line in sees])
        assert torch.equal(mask.flatten(0, 2).float(), wanted)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("windows", [{}, {"sliding_window": 6, "full_attention_interval": 2}], ids=["Olmo2", "Olmo3"])
def test_logits_and_gradients(windows: dict[str, int], kernels: str, recompute: Recompute) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2}  # fmt: skip
    config = ModelConfig.model_validate(shape | windows)
    layers = build_layers(config, OverEncodingConfig(), kernels=choose_kernels(kernels, CPU), recompute=recompute)
    layers.reset(seed=1, std=0.05)
    model = Transformer(layers, eod_id=END)
    theirs = hugging_face_model(config)
    theirs.load_state_dict({name: weight.detach().clone() for name, weight in hugging_face_names(model).items()})
    tokens = packed()
    logits = torch.stack([torch.cat([theirs(part[None]).logits[0] for part in documents_of(line)]) for line in tokens])
    torch.testing.assert_close(model.logits(tokens), logits, rtol=1e-5, atol=1e-5)

    targets = torch.randint(0, VOCAB, tokens.shape, generator=torch.Generator().manual_seed(1))
    objective, *_ = model(tokens, None, targets)
    objective.backward()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    parameters = dict(theirs.named_parameters())
    for name, grad in hugging_face_names(model, lambda weight: weight.grad).items():
        if name in parameters:
            wanted = parameters[name].grad
            assert (grad - wanted).norm() < 1e-5 * wanted.norm(), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_layers_of_a_window_share_a_mask(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.model_validate(
        {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_layers": 5, "num_attention_heads": 2,
         "sliding_window": 6, "full_attention_interval": 2}
    )  # fmt: skip
    layers = build_layers(config, OverEncodingConfig(), kernels=choose_kernels("auto", CPU), recompute=recompute)
    layers.reset(seed=1, std=0.05)
    made: list[int | None] = []

    def watched(documents: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        made.append(window)
        return document_mask(documents, window, dtype)

    monkeypatch.setattr(reference, "document_mask", watched)
    model = Transformer(layers, eod_id=END).to(torch.bfloat16)
    objective, *_ = model(packed(), None, packed())
    objective.backward()
    assert made == [6, None]


def test_without_inner_ends_it_is_the_causal_model() -> None:
    config = ModelConfig.model_validate(
        {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2, "num_attention_heads": 2}
    )
    layers = build_layers(config, OverEncodingConfig(), kernels=choose_kernels("torch", CPU))
    layers.reset(seed=1, std=0.5)
    across, within = Transformer(layers), Transformer(layers, eod_id=END)
    tokens = packed()
    torch.testing.assert_close(within.logits(tokens[2:]), across.logits(tokens[2:]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(within.logits(tokens[:1]), across.logits(tokens[:1]), rtol=1e-2, atol=1e-2)
