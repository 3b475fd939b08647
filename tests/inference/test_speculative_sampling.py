"""Sampled tokens of speculative decoding have exactly the model's distribution: chi-square over three tokens jointly.

The vocabulary has 8 tokens, so the distribution of three tokens is computed exactly, by the formula, from full forward passes.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.inference import acceptance
from overtok_megatron.inference.acceptance import draw_tokens
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Draw, Sampling
from overtok_megatron.inference.speculation import SpeculativeDecoder
from support.assembling import cpu_model, cpu_reader
from support.proposers import bigrams
from support.small_models import Letters, full_logits

VOCAB, DRAFTS = 8, 2
PROMPT = [3, 1, 4]  # the last one is pending
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.3": {"temperature": 1.3},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 4},
    "all of them": {"temperature": 1.3, "top_k": 6, "top_p": 0.85},
}


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    """An over-encoded model, whose distributions are neither flat nor sure."""
    config = RunConfig.model_validate(
        {
            "model": {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_layers": 1,
                      "num_attention_heads": 2, "init_std": 0.25},
            "over_encoding": {"enabled": True, "ngram_order": 3, "num_slices": 1, "table_rows": 100, "init_std": 0.5,
                              "combine": "sum", "row_width": 8},
            "tokenizer": {"path": "none"},
            "data": {"train": "none", "seq_length": 16},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"output_directory": "none", "micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1,
                         "precision": "fp32"},
        }
    )  # fmt: skip
    model = cpu_model(config).eval()
    return TrainedModel(config=config, model=model, tables=cpu_reader(config, -1), tokenizer=Letters(), step=0)


def filtered(logits: Tensor, sampling: Sampling) -> list[float]:
    """The probabilities of the tokens by the formula: the k likeliest, then the fewest of these that reach top_p."""
    shares = [math.exp(value / sampling.temperature) for value in logits.tolist()]
    ranking = sorted(range(VOCAB), key=lambda token: -shares[token])[: sampling.top_k or VOCAB]
    total, kept = sum(shares[token] for token in ranking), list[int]()
    while sum(shares[token] for token in kept) < sampling.top_p * total and len(kept) < len(ranking):
        kept.append(ranking[len(kept)])
    total = sum(shares[token] for token in kept)
    return [shares[token] / total if token in kept else 0.0 for token in range(VOCAB)]


def exact(trained: TrainedModel, sampling: Sampling) -> Tensor:
    """The probabilities of all texts of three tokens, [512] float64."""
    texts = [list(tokens) for tokens in product(range(VOCAB), repeat=3)]
    logits = full_logits(trained, torch.tensor([PROMPT + tokens[:2] for tokens in texts]))[:, -3:]
    chances = []
    for tokens, rows in zip(texts, logits, strict=True):
        shares = [filtered(row, sampling)[token] for row, token in zip(rows, tokens, strict=True)]
        chances.append(math.prod(shares))
    return torch.tensor(chances, dtype=torch.float64)


def observed(trained: TrainedModel, sampling: Sampling, rows: int, first_seed: int) -> tuple[Tensor, list[float]]:
    """How often each text of three tokens was drawn, [512], and the share of passes that accepted the drafts."""
    speculation = bigrams(VOCAB, DRAFTS, scale=0.7)
    decoder = SpeculativeDecoder(trained, rows, len(PROMPT) + 3 * (DRAFTS + 1), speculation)
    decoder.feed(torch.tensor([PROMPT[:-1]]).expand(rows, -1), last=True)
    generators = [torch.Generator().manual_seed(first_seed + row) for row in range(rows)]
    draws = [Draw(sampling, generator) for generator in generators]
    texts: list[list[int]] = [[] for _ in draws]
    pending = [PROMPT[-1]] * rows
    for _ in range(3):
        for text, run in zip(texts, runs := decoder.advance(pending, draws), strict=True):
            text += run.tokens
        pending = [run.tokens[-1] for run in runs]
    index = torch.tensor([(a * VOCAB + b) * VOCAB + c for a, b, c, *_ in texts])
    return torch.bincount(index, minlength=VOCAB**3), speculation.counts.shares


def chance(counts: Tensor, expected: Tensor) -> float:
    """The probability that counts differ from the expected distribution at least so much; 0 where an impossible text occurs.

    Texts that are expected fewer than ten times are counted together.
    """
    if counts[expected == 0.0].any():
        return 0.0
    wanted = expected * counts.sum()
    rare = wanted < 10
    wanted = torch.cat([wanted[~rare], wanted[rare].sum().reshape(1)])
    counts = torch.cat([counts[~rare], counts[rare].sum().reshape(1)])
    wanted, counts = wanted[wanted > 0], counts[wanted > 0]
    statistic = ((counts - wanted).square() / wanted).sum()
    freedom = torch.tensor(len(counts) - 1, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def judge(trained: TrainedModel, settings: dict[str, Any], rows: int, batches: int = 1) -> tuple[float, list[float]]:
    sampling = Sampling(**settings)
    results = [observed(trained, sampling, rows, rows * batch) for batch in range(batches)]
    counts = torch.stack([count for count, _ in results]).sum(dim=0)
    assert counts.sum() == rows * batches
    return chance(counts, exact(trained, sampling)), results[0][1]


def wrong_residual(p: Tensor, q: Tensor) -> Tensor:
    """A rejected draft is drawn anew from the whole distribution."""
    return p


def wrong_bonus(p: Tensor) -> Tensor:
    """The token behind the drafts is drawn as the last draft should be."""
    return p[:, -2]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_distribution_is_the_models(trained: TrainedModel, settings: dict[str, Any]) -> None:
    found, shares = judge(trained, settings, 20_000)
    assert found > 0.005
    assert 0.03 < shares[1] < shares[0] < 0.95


@pytest.mark.ci
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_distribution_of_many_draws(trained: TrainedModel, settings: dict[str, Any]) -> None:
    found, _ = judge(trained, settings, 25_000, batches=4)
    assert found > 0.005


@pytest.mark.parametrize(
    ("name", "mutant"),
    [("residual_distribution", wrong_residual), ("bonus_distribution", wrong_bonus)],
)
def test_a_wrong_rule_is_found(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch, name: str, mutant: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(acceptance, name, mutant)
    for settings in ("temperature 0.7", "temperature 1.3"):
        found, _ = judge(trained, SETTINGS[settings], 20_000)
        assert found < 1e-6


def test_sequences_of_different_settings_in_one_batch(trained: TrainedModel) -> None:
    """Each gets what it would get alone; greedy ones among them."""
    kinds = [Sampling(**settings, seed=seed) for settings in SETTINGS.values() for seed in range(3)]
    kinds += [Sampling(), Sampling(top_k=3)]

    def texts(samplings: list[Sampling]) -> list[list[int]]:
        decoder = SpeculativeDecoder(trained, len(samplings), 16, bigrams(VOCAB, DRAFTS, scale=0.7))
        decoder.feed(torch.tensor([PROMPT[:-1]]).expand(len(samplings), -1))
        draws = [Draw.begin(sampling, trained.device) for sampling in samplings]
        made: list[list[int]] = [[PROMPT[-1]] for _ in draws]
        for _ in range(4):
            for text, run in zip(made, decoder.advance([text[-1] for text in made], draws), strict=True):
                text += run.tokens
        return made

    together = texts(kinds)
    assert together == [texts([kind])[0] for kind in kinds]
    assert together[-1] == together[-2]  # greedy
    assert len({tuple(text) for text in together}) > 8


def test_inversion_draws_no_impossible_token() -> None:
    shares = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    edges = torch.tensor([0.0, 0.3 - 1e-12, 0.3 + 1e-12, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(shares.expand(4, 5), edges).tolist() == [1, 1, 3, 3]
    assert draw_tokens(3.7 * shares.expand(4, 5), edges).tolist() == [1, 1, 3, 3]
    assert draw_tokens(shares, torch.tensor(1.0, dtype=torch.float64)).item() == 3  # what rounding may ask for
