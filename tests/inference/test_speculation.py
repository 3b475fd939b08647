"""Texts by drafts are those of plain decoding, token for token, whatever the drafts are and wherever sequences end."""

from dataclasses import replace
from typing import Any

import pytest

from overtok_megatron.inference.generation import generate_texts, generate_tokens
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Sampling
from overtok_megatron.inference.speculation import Speculation
from support.proposers import bigrams, by_model
from support.small_models import VOCAB, Endless, Letters, build_small_model

PROMPTS = [[5], [7, 0, 9, 12, 33, 2], [60, 1, 1], [int(letter) + 1 for letter in "314159265358979"], [4, 4]]
NONE, SOME, ALL = "none accepted", "some accepted", "all accepted"


def speculation_of(kind: str, trained: TrainedModel, num_drafts: int) -> Speculation:
    if kind == NONE:
        return bigrams(VOCAB, num_drafts)
    return by_model(trained, num_drafts, 0.0 if kind == ALL else 0.4)


@pytest.mark.parametrize("num_drafts", [1, 3])
@pytest.mark.parametrize("kind", [NONE, SOME, ALL])
def test_greedy_texts_are_plain_ones(small_model: TrainedModel, kind: str, num_drafts: int) -> None:
    """A batch of prompts of different lengths, whose sequences accept different numbers; no text ends by itself."""
    endless = replace(small_model, tokenizer=Endless(Letters()))
    sampling = Sampling(max_new_tokens=20)
    speculation = speculation_of(kind, endless, num_drafts)
    assert generate_tokens(endless, PROMPTS, sampling, speculation) == generate_tokens(endless, PROMPTS, sampling)
    counts = speculation.counts
    assert counts.passes > 0
    if kind == ALL:
        assert counts.accepted == [counts.passes] * num_drafts
    elif kind == SOME:
        assert 0.1 < counts.shares[-1] <= counts.shares[0] < 0.97
    else:
        assert counts.shares[0] < 0.3


@pytest.mark.parametrize("kind", [NONE, SOME, ALL])
def test_ends_within_a_run(small_model: TrainedModel, kind: str) -> None:
    """Every token that occurs is the end of a document in turn; and every limit of length, also below the number of drafts."""
    tokenizer = Letters()
    tokenizer.eod_id = -5
    trained = replace(small_model, tokenizer=tokenizer)
    whole = generate_tokens(trained, PROMPTS, Sampling(max_new_tokens=16))
    for eod in sorted({token for tokens in whole for token in tokens})[::6]:
        tokenizer.eod_id = eod
        expected = [tokens[: tokens.index(eod)] if eod in tokens else tokens for tokens in whole]
        speculation = speculation_of(kind, trained, 3)
        assert generate_tokens(trained, PROMPTS, Sampling(max_new_tokens=16), speculation) == expected
    tokenizer.eod_id = -5
    for limit in (1, 2, 3, 6):
        speculation = speculation_of(kind, trained, 3)
        made = generate_tokens(trained, PROMPTS, Sampling(max_new_tokens=limit), speculation)
        assert made == [tokens[:limit] for tokens in whole]


@pytest.mark.parametrize("kind", [NONE, SOME, ALL])
def test_stop_strings_within_a_run(small_model: TrainedModel, kind: str) -> None:
    sampling = Sampling(max_new_tokens=20)
    whole = generate_texts(small_model, PROMPTS, sampling)
    for size in (1, 2, 3):
        stops = [text[7 : 7 + size] for text in whole[:2] if len(text) > 10]
        expected = generate_texts(small_model, PROMPTS, sampling, stops)
        speculation = speculation_of(kind, small_model, 4)
        assert generate_texts(small_model, PROMPTS, sampling, stops, speculation=speculation) == expected


INT8 = {"enabled": True, "ngram_order": 3, "num_slices": 1, "table_rows": 1000, "row_width": 16, "init_std": 0.5,
        "combine": "sum", "row_dtype": "int8"}  # fmt: skip


@pytest.mark.parametrize("kind", [NONE, SOME, ALL])
def test_int8_rows(kind: str) -> None:
    trained = replace(build_small_model("over-encoded", over_encoding=INT8), tokenizer=Endless(Letters()))
    sampling = Sampling(max_new_tokens=20)
    made = generate_tokens(trained, PROMPTS, sampling, speculation_of(kind, trained, 3))
    assert made == generate_tokens(trained, PROMPTS, sampling)


def test_the_context_may_be_filled(small_model: TrainedModel) -> None:
    """Drafts reach beyond it, and are dropped."""
    endless = replace(small_model, tokenizer=Endless(Letters()))
    sampling = Sampling(max_new_tokens=10)
    made = generate_tokens(endless, [[5] * 30], sampling, by_model(endless, 7))
    assert made == generate_tokens(endless, [[5] * 30], sampling)
    assert generate_tokens(endless, [], sampling, by_model(endless, 7)) == []


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 1.3, "top_p": 0.9, "top_k": 20}])
def test_a_sampled_text_does_not_depend_on_the_company(small_model: TrainedModel, settings: dict[str, Any]) -> None:
    sampling = Sampling(max_new_tokens=16, seed=4, **settings)
    together = generate_tokens(small_model, PROMPTS, sampling, by_model(small_model, 2, 1.0))
    alone = [generate_tokens(small_model, [prompt], sampling, by_model(small_model, 2, 1.0))[0] for prompt in PROMPTS]
    assert together == alone
    other = replace(sampling, seed=5)
    assert generate_tokens(small_model, PROMPTS, other, by_model(small_model, 2, 1.0)) != together
