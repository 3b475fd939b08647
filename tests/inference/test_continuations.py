"""Continuations keep the space that many tokenizers leave out at the begin of a text: generate, serve, streams, scores."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from overtok_megatron.cli import main
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.inference import generation
from overtok_megatron.inference.generation import generate, generate_texts, generate_tokens, stream_texts
from overtok_megatron.inference.loading import TrainedModel, load_trained
from overtok_megatron.inference.sampling import Sampling
from support.hugging_face_models import over_encoded_run
from support.live_server import LiveServer, live_server
from support.prefixed_tokenizers import FILES, KINDS, save_prefixed

PROMPTS = ["the state of", "and", "é of"]
SAMPLING = Sampling(max_new_tokens=16, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefixed")
    save_prefixed(folder)
    for kind in KINDS:
        over_encoded_run(folder / kind, folder / FILES[kind], {"init_std": 0.05}, {"enabled": False})
    return folder


@pytest.fixture(params=KINDS, scope="module")
def trained(runs: Path, request: pytest.FixtureRequest) -> TrainedModel:
    return load_trained(runs / request.param, torch.device("cpu"))


@pytest.fixture(scope="module")
def server(trained: TrainedModel) -> Iterator[LiveServer]:
    with live_server(trained) as server:
        yield server


def whole(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> tuple[str, str]:
    """(a prompt's text, the text of all tokens)"""
    return tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])


def test_generate(trained: TrainedModel) -> None:
    prompts = trained.tokenizer.encode_batch(PROMPTS)
    made = generate_tokens(trained, prompts, SAMPLING)
    texts = generate(trained, PROMPTS, SAMPLING)
    for prompt, words, tokens, text in zip(prompts, PROMPTS, made, texts, strict=True):
        before, both = whole(trained.tokenizer, prompt, tokens)
        assert before == words
        assert before + text == both
        assert "".join(stream_texts(trained, words, SAMPLING)) == text
    assert any(" " in text for text in texts)
    (stopped,) = generate_texts(trained, prompts[:1], SAMPLING, [texts[0][3:6]])
    assert stopped == texts[0][: texts[0].index(texts[0][3:6])]
    alone = generate_texts(trained, prompts, SAMPLING, alone=True)  # as lm-eval decodes
    assert alone == [trained.tokenizer.decode(tokens) for tokens in made]


def test_a_space_is_the_first_that_is_said(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a random model draws, here it is " and of"."""
    said = trained.tokenizer.encode("and of")

    def stream_tokens(*_: Any) -> Iterator[list[list[int]]]:
        yield from ([[token]] for token in said)

    monkeypatch.setattr(generation, "stream_tokens", stream_tokens)
    assert generate(trained, ["the state"], SAMPLING) == [" and of"]
    assert "".join(stream_texts(trained, "the state", SAMPLING)) == " and of"
    prompt = trained.tokenizer.encode("the state")
    assert generate_texts(trained, [prompt], SAMPLING, ["of"]) == [" and "]
    assert generate_texts(trained, [prompt], SAMPLING, [" "]) == [""]
    assert generate_texts(trained, [prompt], SAMPLING, alone=True) == ["and of"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_verb_prints_the_space(runs: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    trained = load_trained(runs / kind, torch.device("cpu"))
    settings = ["--temperature", "1", "--seed", "3", "--max-new-tokens", "16"]
    for words in PROMPTS:
        assert main(["generate", str(runs / kind), "--prompt", words, *settings]) == 0
        prompt = trained.tokenizer.encode(words)
        (tokens,) = generate_tokens(trained, [prompt], SAMPLING)
        assert capsys.readouterr().out == trained.tokenizer.decode([*prompt, *tokens]) + "\n"


def asked(server: LiveServer, prompt: Any, **settings: Any) -> dict[str, Any]:
    answer = server.post(prompt=prompt, max_tokens=16, temperature=1.0, seed=3, **settings)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def streamed(server: LiveServer, prompt: Any, **settings: Any) -> str:
    answer = server.post(prompt=prompt, max_tokens=16, temperature=1.0, seed=3, stream=True, **settings)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_serving(trained: TrainedModel, server: LiveServer) -> None:
    for words in PROMPTS:
        (text,) = generate(trained, [words], SAMPLING)
        assert asked(server, words)["text"] == streamed(server, words) == text
        assert asked(server, words, echo=True)["text"] == streamed(server, words, echo=True) == words + text


def test_scores_name_tokens_with_their_space(trained: TrainedModel, server: LiveServer) -> None:
    """As they stand in the text: tokens of whole characters, joined, are the answer."""
    spaced = 0
    for words in PROMPTS[:2]:
        for echo in (False, True):
            choice = asked(server, words, echo=echo, logprobs=5)
            scores = choice["logprobs"]
            whole = True  # so far; bytes that are no character change what was before them
            for token, top, offset in zip(scores["tokens"], scores["top_logprobs"], scores["text_offset"], strict=True):
                whole = whole and not token.startswith("token_id:")
                assert not whole or choice["text"][offset:].startswith(token)
                spaced += token.startswith(" ") + sum(other.startswith(" ") for other in top or ())
            if whole:
                assert "".join(scores["tokens"]) == choice["text"]
    assert spaced > 5


@pytest.mark.parametrize("letter", ["é", "中", "🙂"])
def test_a_prompt_that_ends_within_a_character(trained: TrainedModel, server: LiveServer, letter: str) -> None:
    """What is echoed and what is generated are the text of all tokens; with Llama's decoder, whose wrong bytes take whole ones
    before them along, behind what was said."""
    tokenizer = trained.tokenizer
    everything = tokenizer.encode(f"a {letter}")
    prompt = everything[:-1]
    (tokens,) = generate_tokens(trained, [prompt], SAMPLING)
    _, both = whole(tokenizer, prompt, tokens)
    assert asked(server, prompt, echo=True)["text"] == streamed(server, prompt, echo=True) == both
    (text,) = generate_texts(trained, [prompt], SAMPLING)
    assert asked(server, prompt)["text"] == streamed(server, prompt) == text
    assert both.endswith(text)
    nothing = server.post(prompt=everything[:-1], max_tokens=0, echo=True).json()["choices"][0]["text"]
    assert nothing == tokenizer.decode(everything[:-1])
