"""Decoding with a cache and an n-gram history gives the ids and logits of the full forward pass."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from overtok_megatron.errors import InputError
from overtok_megatron.inference.decoder import IncrementalDecoder, pad_left
from overtok_megatron.inference.generation import generate, generate_tokens
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Sampling, choose
from support.small_models import VOCAB, Letters, full_logits

CPU = torch.device("cpu")


def text_of(size: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cuts", [[1] * 12, [12], [5, 1, 1, 4, 1], [3, 9]])
def test_pieces_give_the_full_logits(small_model: TrainedModel, cuts: list[int]) -> None:
    tokens = text_of(12, 1)
    decoder = IncrementalDecoder(small_model, batch=2, columns=12)
    pieces = [decoder.feed(piece) for piece in tokens.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full_logits(small_model, tokens), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_pieces_of_any_size_in_a_padded_batch(small_model: TrainedModel, seed: int) -> None:
    """Random sizes, ends of documents in the text and in the padding's place, single tokens among long pieces."""
    draw = random.Random(seed)
    sequences = [[draw.choice([0, *range(VOCAB)]) for _ in range(draw.randint(1, 24))] for _ in range(4)]
    tokens = pad_left(sequences, CPU)
    decoder, begin, pieces = IncrementalDecoder(small_model, 4, tokens.shape[1]), 0, []
    while begin < tokens.shape[1]:
        end = begin + draw.choice([1, 1, 2, 3, 7])
        pieces.append(decoder.feed(tokens[:, begin:end]))
        begin = end
    logits = torch.cat(pieces, dim=1)
    for index, sequence in enumerate(sequences):
        own = full_logits(small_model, torch.tensor([sequence]))[0]
        torch.testing.assert_close(logits[index, -len(sequence) :], own, rtol=1e-5, atol=1e-5 * own.abs().max().item())


def test_a_document_that_has_ended_counts_only_across(small_model: TrainedModel) -> None:
    """N-grams forget it in any case."""
    text = torch.tensor([[5, 9, 0, 7, 8]])
    behind, alone = IncrementalDecoder(small_model, 1, 5).feed(text)[:, 3:], full_logits(small_model, text[:, 3:])
    assert torch.allclose(behind, alone, rtol=1e-5, atol=1e-4) == (
        small_model.config.data.document_attention == "within"
    )


def test_greedy_is_the_argmax_of_the_full_forward(small_model: TrainedModel) -> None:
    prompt = small_model.tokenizer.encode("the people")
    chosen = generate_tokens(small_model, [prompt], Sampling(max_new_tokens=12))[0]
    tokens = list(prompt)
    for token in chosen:
        assert full_logits(small_model, torch.tensor([tokens]))[0, -1].argmax() == token
        tokens.append(token)
    assert len(chosen) == 12 or full_logits(small_model, torch.tensor([tokens]))[0, -1].argmax() == 0


def test_an_uneven_batch_gives_each_prompt_its_own_text(small_model: TrainedModel) -> None:
    prompts = [small_model.tokenizer.encode(text) for text in ("a", "of the united states", "people", "we")]
    sampling = Sampling(max_new_tokens=10)
    together = generate_tokens(small_model, prompts, sampling)
    assert together == [generate_tokens(small_model, [prompt], sampling)[0] for prompt in prompts]
    padded = IncrementalDecoder(small_model, 4, 20).feed(pad_left(prompts, CPU))
    for index, prompt in enumerate(prompts):
        own = full_logits(small_model, torch.tensor([prompt]))[0]
        torch.testing.assert_close(padded[index, -len(prompt) :], own, rtol=1e-5, atol=1e-4)


def test_sampling(small_model: TrainedModel) -> None:
    def sample(**settings: float) -> list[str]:
        return generate(small_model, ["the union"], Sampling(max_new_tokens=20, **settings))  # type: ignore[arg-type]

    greedy = sample()
    assert sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1)
    assert len({sample(temperature=2.0, seed=seed)[0] for seed in range(4)}) > 1
    assert sample(temperature=1.0, top_k=1) == greedy
    assert sample(temperature=1.0, top_p=1e-9) == greedy


def test_a_text_stops_at_its_end_of_document(small_model: TrainedModel) -> None:
    """One prompt of a batch ends early, and does not change the others."""
    prompts = [small_model.tokenizer.encode(text) for text in ("the union", "a", "people of")]
    prompts.append([*small_model.tokenizer.encode("the "), 0, *small_model.tokenizer.encode("we")])
    tokenizer = Letters()
    tokenizer.eod_id = -5  # no token: nothing stops
    endless = replace(small_model, tokenizer=tokenizer)
    sampling = Sampling(max_new_tokens=12)
    whole = generate_tokens(endless, prompts, sampling)
    assert [len(tokens) for tokens in whole] == [12] * 4
    for eod in {token for tokens in whole for token in tokens}:
        tokenizer.eod_id = eod
        expected = [tokens[: tokens.index(eod)] if eod in tokens else tokens for tokens in whole]
        assert any(len(tokens) < 12 for tokens in expected)
        assert generate_tokens(endless, prompts, sampling) == expected
        assert generate_tokens(endless, prompts[:1], sampling) == expected[:1]


def test_choices_keep_to_their_candidates() -> None:
    """Frequencies of a known distribution: truncated by top_k and top_p, sharpened by temperature."""
    shares = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])
    logits = (shares.log() + 300.0).expand(20_000, -1)

    def frequencies(**settings: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling(**{"temperature": 1.0, **settings})  # type: ignore[arg-type]
        return torch.bincount(choose(logits, sampling, generator), minlength=5) / 20_000

    def near(actual: torch.Tensor, candidates: list[int], power: float = 1.0) -> None:
        expected = torch.zeros(5)
        expected[candidates] = shares[candidates] ** power
        torch.testing.assert_close(actual, expected / expected.sum(), rtol=0, atol=0.015)
        assert set(actual.nonzero().flatten().tolist()) == set(candidates)

    near(frequencies(), [0, 1, 2, 3, 4])
    near(frequencies(temperature=0.5), [0, 1, 2, 3, 4], 2.0)
    near(frequencies(top_k=3), [1, 2, 3])
    near(frequencies(top_k=50), [0, 1, 2, 3, 4])
    near(frequencies(top_p=0.6), [1, 2])
    near(frequencies(top_p=0.7), [1, 2, 3])
    near(frequencies(top_p=0.7, top_k=2), [1, 2])
    near(frequencies(top_p=0.01), [1])
    for temperature in (1e-3, 1e-40, 1e-300):
        near(frequencies(temperature=temperature), [1])


def test_what_just_fits_the_context_is_served(small_model: TrainedModel) -> None:
    tokenizer = Letters()
    tokenizer.eod_id = -5
    assert (
        len(generate_tokens(replace(small_model, tokenizer=tokenizer), [[5] * 30], Sampling(max_new_tokens=10))[0])
        == 10
    )
    assert generate_tokens(small_model, [], Sampling()) == []


@pytest.mark.parametrize(
    ("prompt", "settings", "part"),
    [
        ("", {}, "prompt 1: empty"),
        ("x" * 30, {"max_new_tokens": 11}, "context of 40 tokens; shorten it, or ask for at most 10"),
        ("x", {"temperature": -0.1}, "temperature: -0.1"),
        ("x" * 50, {"max_new_tokens": 1}, "prompt 1: 50 tokens and max_new_tokens 1 pass the context of 40 tokens"),
        ("x", {"temperature": float("nan")}, "temperature: nan"),
        ("x", {"top_p": 1.1}, "top_p: 1.1"),
        ("x", {"seed": 2**64}, "seed: 18446744073709551616"),
        ("x", {"top_p": 0.0}, "top_p: 0.0"),
        ("x", {"top_k": -1}, "top_k: -1"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens: 0"),
    ],
)
def test_requests_that_cannot_be_served(
    small_model: TrainedModel, prompt: str, settings: dict[str, float], part: str
) -> None:
    with pytest.raises(InputError) as caught:
        generate(small_model, [prompt], Sampling(**settings))  # type: ignore[arg-type]
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    from overtok_megatron.errors import CheckpointError
    from overtok_megatron.inference.loading import load_trained

    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_trained(tmp_path, CPU)
