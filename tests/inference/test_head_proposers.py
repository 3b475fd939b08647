"""Heads draft what they predict in one full forward pass, whatever was accepted before; and texts by them are plain ones."""

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from overtok_megatron.errors import InputError
from overtok_megatron.inference.decoder import pad_left
from overtok_megatron.inference.generation import generate_tokens
from overtok_megatron.inference.head_proposers import MultiTokenProposer, OverDecodingProposer, head_speculation
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Draw, Sampling
from overtok_megatron.inference.speculation import Proposer, SpeculativeDecoder
from overtok_megatron.kernels.documents import Documents
from overtok_megatron.model.documents import document_ids
from overtok_megatron.model.over_decoding import OverDecodingTable
from support.small_models import KINDS, WITHIN, Endless, Letters, build_small_model

PROMPTS = [[5], [7, 0, 9, 12, 33, 2], [60, 1, 1], [int(letter) + 1 for letter in "314159265358"], [4, 4]]
HEADS: dict[str, dict[str, Any]] = {
    "over-decoding": {"over_decoding": {"num_tokens": 4, "loss_weights": [0.1, 0.1, 0.1], "low_rank": 8}},
    "one depth": {"multi_token_prediction": {"depth": 1}},
    "three depths": {"multi_token_prediction": {"depth": 3}},
}


@torch.no_grad()
def logits_of(trained: TrainedModel, tokens: list[int], drafts: list[int]) -> list[Tensor]:
    """The logits [V] of the given drafts behind tokens, the last of which is pending, and of the next one, from one pass over
    everything."""
    model = trained.model
    known = torch.tensor([tokens[:-1]])
    hidden = model.head.norm(model.hidden(known, trained.fetch_rows(known))[0])  # [1, n, d]
    if model.multi_token is None:
        assert model.over_decoding is not None
        tables = [table for table in model.over_decoding.tables.values() if isinstance(table, OverDecodingTable)]
        return [table.logits(hidden, hidden)[0, -1] for table in tables]
    everything = torch.tensor([tokens + drafts])
    embedded = model.embedding(everything, trained.fetch_rows(everything))
    documents = None if model.eod_id is None else Documents(document_ids(known, model.eod_id))
    states = model.multi_token.states(
        hidden, lambda depth: embedded[:, depth : depth + known.shape[1]], documents=documents
    )
    return [model.head.project(state)[0, -1] for state, _ in islice(states, len(drafts) + 1)]


class Recording:
    """A proposer that keeps the logits of its drafts."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer, self.logits = proposer, list[Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proposer, name)

    def propose(self, pending: Tensor, draft: Any) -> Tensor:
        self.logits = []

        def recorded(logits: Tensor) -> Tensor:
            self.logits.append(logits)
            return draft(logits)

        return self._proposer.propose(pending, recorded)


def check_pass(
    trained: TrainedModel, decoder: SpeculativeDecoder, texts: list[list[int]], draws: list[Draw]
) -> list[int]:
    """One pass, whose drafts have the logits of full passes; how many tokens each text then gets."""
    recording = Recording(decoder.proposer)
    decoder.proposer = recording
    runs = decoder.advance([text[-1] for text in texts], draws)
    decoder.proposer = recording._proposer
    for row, (text, run) in enumerate(zip(texts, runs, strict=True)):
        assert len(recording.logits) == decoder.proposer.num_drafts
        length = decoder.cache.lengths[row]
        assert length == len(text) - 1 + len(run.tokens)
        end = decoder.cache.ends[row]
        assert decoder.cache.tokens[row, end - length : end].tolist() == [*text, *run.tokens[:-1]]
        drafts = run.tokens[
            :-1
        ]  # the accepted ones: a later draft's logits are compared as far as its inputs are known
        for index, own in enumerate(logits_of(trained, text, drafts)[: len(run.tokens)]):
            taken = recording.logits[index][row]
            torch.testing.assert_close(taken, own, rtol=1e-5, atol=2e-5 * own.abs().max().item())
        text += run.tokens
    return [len(run.tokens) for run in runs]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_drafts_are_those_of_full_passes(kind: str, heads: dict[str, Any], seed: int) -> None:
    """Prompts in a padded batch, in chunks of their own and joining later; rows leave; a hot sampling accepts some of the
    drafts of heads that were never trained."""
    trained = build_small_model(kind, **heads)
    make = head_speculation(trained)
    sampling = Sampling(temperature=8.0, seed=seed)
    decoder = SpeculativeDecoder(trained, 6, 150, make)
    texts = [list(prompt) for prompt in PROMPTS]
    decoder.feed(pad_left([text[:-1] or [9] for text in texts], trained.device))
    texts[0] = [9, *texts[0]]
    draws = [Draw.begin(replace(sampling, seed=seed + row), trained.device) for row in range(6)]
    taken = [*check_pass(trained, decoder, texts, draws[:5]), *check_pass(trained, decoder, texts, draws[:5])]
    own = SpeculativeDecoder(trained, 1, 30, make)
    joining = [int(letter) + 1 for letter in "2718281828"]
    for chunk in torch.tensor([joining]).split([1, 1, 5, 3], dim=1):
        own.feed(chunk)
    decoder.join(own)
    texts.append([*joining, 3])
    for _ in range(3):
        taken += check_pass(trained, decoder, texts, draws)
    for row in (0, 3, 3):
        decoder.leave(row)
        texts[row], draws[row] = texts[-1], draws[-1]
        texts.pop()
        draws.pop()
        taken += check_pass(trained, decoder, texts, draws)
    decoder.join(own)
    texts.append([*joining, 7])
    draws.append(Draw.begin(sampling, trained.device))
    taken += check_pass(trained, decoder, texts, draws)
    assert {1, 2} <= set(taken)
    assert make.counts.passes == len(taken)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", ["over-encoded", WITHIN])
def test_texts_are_plain_ones(kind: str, heads: dict[str, Any]) -> None:
    trained = replace(build_small_model(kind, **heads), tokenizer=Endless(Letters()))
    sampling = Sampling(max_new_tokens=20)
    assert generate_tokens(trained, PROMPTS, sampling, head_speculation(trained)) == generate_tokens(
        trained, PROMPTS, sampling
    )


def test_which_heads_draft() -> None:
    both = build_small_model("plain", **HEADS["over-decoding"], **HEADS["one depth"])
    assert isinstance(head_speculation(both).make_proposer(1, 10), MultiTokenProposer)
    tables = build_small_model("plain", **HEADS["over-decoding"])
    assert isinstance(head_speculation(tables).make_proposer(1, 10), OverDecodingProposer)
    with pytest.raises(InputError, match="no heads that draft tokens") as caught:
        head_speculation(build_small_model("plain"))
    assert "\n" not in str(caught.value)
