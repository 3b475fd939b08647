"""Answers through the `openai` client: the texts of `overtok generate`, whole and streamed, alone and in company."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from overtok_megatron.inference.generation import generate, generate_texts
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Sampling
from support.live_server import LiveServer, live_server
from support.trained_runs import TrainedRuns

PROMPTS = ["The people", "of the United States", "Fellow-Citizens of the Senate and House", "é", "In the", "We"]


@pytest.fixture(scope="module")
def trained(trained_runs: TrainedRuns) -> TrainedModel:
    return trained_runs.trained()


@pytest.fixture(scope="module")
def server(trained: TrainedModel) -> Iterator[LiveServer]:
    with live_server(trained) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_greedy_is_generates(client: openai.OpenAI, trained: TrainedModel) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=20, temperature=0)
    assert [choice.text for choice in answer.choices] == generate(trained, PROMPTS, Sampling(max_new_tokens=20))
    assert [choice.index for choice in answer.choices] == list(range(6))
    encoded = trained.tokenizer.encode_batch(PROMPTS)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, encoded))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    by_ids = client.completions.create(model="tiny", prompt=encoded[:2], max_tokens=20, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in answer.choices[:2]]


def test_streams_are_the_whole_answers(client: openai.OpenAI, trained: TrainedModel) -> None:
    sampling = Sampling(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=7)
    events = list(
        client.completions.create(
            model="tiny", prompt=PROMPTS[:3], max_tokens=24, temperature=1.0, top_p=0.9, seed=7, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    texts, reasons = ["", "", ""], [None, None, None]
    for event in events[:-1]:
        (choice,) = event.choices
        assert reasons[choice.index] is None
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == generate(trained, PROMPTS[:3], sampling)
    assert all(reason in ("stop", "length") for reason in reasons)
    assert events[-1].choices == []
    assert 3 < events[-1].usage.completion_tokens <= 72
    assert len(events) > 10
    assert len({event.id for event in events}) == 1


def test_sampling_does_not_depend_on_the_company(client: openai.OpenAI, trained: TrainedModel) -> None:
    """Sixteen requests at once on four slots: each gets the text of its seed."""
    asked = [(PROMPTS[index % 6], 5 + 2 * index % 30, 0.5 + index % 3, index * 1000) for index in range(16)]

    def ask(prompt: str, size: int, temperature: float, seed: int) -> str:
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=size, temperature=temperature, seed=seed
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda parts: ask(*parts), asked))
    alone = [
        generate(trained, [prompt], Sampling(max_new_tokens=size, temperature=heat, seed=seed))[0]
        for prompt, size, heat, seed in asked
    ]
    assert texts == alone
    assert len(set(texts)) > 12


def test_several_texts_of_a_prompt(client: openai.OpenAI, trained: TrainedModel) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPTS[:2], n=3, seed=5, max_tokens=12, temperature=1.5)
    expected = [
        generate(trained, [p], Sampling(max_new_tokens=12, temperature=1.5, seed=seed))[0]
        for p in PROMPTS[:2]
        for seed in (5, 6, 7)
    ]
    assert [choice.text for choice in answer.choices] == expected
    unseeded = [
        client.completions.create(model="tiny", prompt="The", max_tokens=12, temperature=2.0).choices[0].text
        for _ in range(3)
    ]
    assert len(set(unseeded)) > 1


def test_stop_strings(client: openai.OpenAI, trained: TrainedModel) -> None:
    (whole,) = generate(trained, ["The people"], Sampling(max_new_tokens=30, temperature=1.0, seed=3))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    prompt = trained.tokenizer.encode("The people")
    (expected,) = generate_texts(trained, [prompt], Sampling(max_new_tokens=30, temperature=1.0, seed=3), [stop])
    settings = {"model": "tiny", "prompt": "The people", "max_tokens": 30, "seed": 3, "stop": [stop, "\0"]}
    (choice,) = client.completions.create(**settings).choices
    assert (choice.text, choice.finish_reason) == (expected, "stop")
    assert whole.startswith(choice.text)
    assert len(choice.text) < len(whole)
    assert "".join(event.choices[0].text for event in client.completions.create(**settings, stream=True)) == expected


@torch.no_grad()
def test_scores_are_the_models(client: openai.OpenAI, trained: TrainedModel) -> None:
    prompt = "The people of"
    (choice,) = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=9, temperature=0.8, seed=1, logprobs=3, echo=True
    ).choices
    scores = choice.logprobs
    assert scores is not None
    size = len(trained.tokenizer.encode(prompt))
    (drawn,) = generate(trained, [prompt], Sampling(max_new_tokens=9, temperature=0.8, seed=1))
    assert choice.text == prompt + drawn
    assert len(scores.tokens) == size + 9
    generated = []
    for chosen in _tokens(trained, prompt, Sampling(max_new_tokens=9, temperature=0.8, seed=1)):
        generated.append(chosen)
    tokens = torch.tensor([[*trained.tokenizer.encode(prompt), *generated]])
    fetched = trained.fetch_rows(tokens)
    logits = trained.model.logits(tokens, fetched)[0].log_softmax(-1)
    expected = logits[:-1].gather(1, tokens[0, 1:, None])[:, 0].tolist()
    assert scores.token_logprobs[0] is None
    assert scores.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    for top, row in zip(scores.top_logprobs[1:], logits[:-1], strict=True):
        assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(3).values.tolist()[: len(top)], abs=1e-4)
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert token.startswith("token_id:") or choice.text[offset:].startswith(token)


def _tokens(trained: TrainedModel, prompt: str, sampling: Sampling) -> list[int]:
    from overtok_megatron.inference.generation import generate_tokens

    return generate_tokens(trained, [trained.tokenizer.encode(prompt)], sampling)[0]


def test_only_the_prompts_scores(client: openai.OpenAI, trained: TrainedModel) -> None:
    """What lm-eval's client asks for: no new tokens, the prompt's own log-probabilities."""
    (choice,) = client.completions.create(
        model="tiny", prompt="of the people", max_tokens=0, echo=True, logprobs=1
    ).choices
    assert choice.text == "of the people"
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens) == len(trained.tokenizer.encode("of the people"))
    assert all(math.isfinite(value) for value in choice.logprobs.token_logprobs[1:])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")


@pytest.mark.parametrize(
    ("settings", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_tokens": 41}, openai.BadRequestError, "max_tokens"),
        ({"prompt": "we the people " * 20}, openai.BadRequestError, "prompt"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty"),
        ({"extra_body": {"colour": 1}}, openai.BadRequestError, "colour"),
        ({"prompt": ["a"] * 5, "n": 2}, openai.BadRequestError, "n"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "stop"),
    ],
)
def test_refusals_name_the_parameter(client: openai.OpenAI, settings: dict, error: type, param: str) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "a", **settings})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
