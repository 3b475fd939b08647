"""A server that decodes by drafts: under load, with cancels, it gives the texts of `generate --speculative`, by their seeds."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from overtok_megatron.inference.generation import generate_texts
from overtok_megatron.inference.head_proposers import head_speculation
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Sampling
from overtok_megatron.inference.speculation import Speculation
from support.live_server import LiveServer, live_server
from support.proposers import by_model
from support.small_models import Endless, build_small_model

DEPTHS = {"multi_token_prediction": {"depth": 2}}
TABLES = {"over_decoding": {"num_tokens": 3, "loss_weights": [0.1, 0.1]}}
PROMPTS = [[5], [7, 0, 9, 12, 33, 2], [60, 1, 1], [int(letter) + 1 for letter in "314159265358"], [4, 4]]
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 4.0, "top_p": 0.9},
    {"temperature": 9.0, "top_k": 30},
]


def untrained(heads: dict[str, Any]) -> tuple[TrainedModel, Speculation]:
    trained = build_small_model("over-encoded", **heads)
    return trained, head_speculation(trained)


def half_right() -> tuple[TrainedModel, Speculation]:
    """Whose drafts are accepted often, also where decoding is greedy."""
    trained = build_small_model("Olmo3, over-encoded")
    return trained, by_model(trained, 3, error=0.4)


KINDS = {"depths": lambda: untrained(DEPTHS), "tables": lambda: untrained(TABLES), "half right": half_right}


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[LiveServer, TrainedModel, Speculation]]:
    trained, speculation = KINDS[request.param]()
    with live_server(trained, speculation=speculation, prefill_chunk=3) as server:
        yield server, trained, speculation
        server.wait_idle()


def request_of(index: int) -> dict[str, Any]:
    """The settings of request number `index`: prompts, lengths and samplings in turn."""
    settings = SAMPLINGS[index % len(SAMPLINGS)]
    return {"prompt": PROMPTS[index % len(PROMPTS)], "max_tokens": 1 + 3 * index % 22, **settings, "seed": 100 * index}


def alone(trained: TrainedModel, speculation: Speculation, request: dict[str, Any], stops: list[str]) -> str:
    keys = {"max_tokens": "max_new_tokens"}
    settings = {keys.get(key, key): value for key, value in request.items() if key != "prompt"}
    sampling = Sampling(**settings)
    (text,) = generate_texts(trained, [request["prompt"]], sampling, stops, speculation=speculation)
    return text


def test_under_load(served: tuple[LiveServer, TrainedModel, Speculation]) -> None:
    """Thirty requests at once on four slots; every third is streamed and left before its end."""
    server, trained, speculation = served
    stops = [chr(64 + 21), chr(64 + 40)]

    def ask(index: int) -> str | None:
        request = {"model": "tiny", "stop": stops, **request_of(index)}
        if index % 3 == 2:
            with httpx.stream("POST", f"{server.url}/v1/completions", json={**request, "stream": True}) as answer:
                next(answer.iter_lines(), None)
            return None
        return server.post(**request).json()["choices"][0]["text"]

    with ThreadPoolExecutor(30) as pool:
        texts = list(pool.map(ask, range(30)))
    server.wait_idle()
    expected = [alone(trained, speculation, request_of(index), stops) for index in range(30)]
    assert [text for text in texts if text is not None] == [
        text for index, text in enumerate(expected) if index % 3 != 2
    ]
    assert len({text for text in texts if text}) > 8


def test_the_verdict_of_health(served: tuple[LiveServer, TrainedModel, Speculation]) -> None:
    server, _, speculation = served
    server.post(**request_of(4))
    server.wait_idle()
    told = server.health()["speculation"]
    assert told["passes"] == speculation.counts.passes > 0
    assert told["accepted_per_pass"] == pytest.approx(sum(told["accepted_shares"]))
    assert len(told["accepted_shares"]) == len(speculation.counts.accepted)


def test_streams_and_scores(served: tuple[LiveServer, TrainedModel, Speculation]) -> None:
    """Each token is one event with its score; they are those of plain decoding where that is greedy."""
    server, trained, _ = served
    asked = {"prompt": PROMPTS[3], "max_tokens": 15, "temperature": 0.0, "logprobs": 3, "echo": True}
    with live_server(trained) as plain:
        expected = plain.post(**asked).json()["choices"][0]
    whole = server.post(**asked).json()
    (choice,) = whole["choices"]
    for key in ("tokens", "text_offset"):
        assert choice["logprobs"][key] == expected["logprobs"][key]
    for own, other in zip(choice["logprobs"]["token_logprobs"], expected["logprobs"]["token_logprobs"], strict=True):
        assert own == other or own == pytest.approx(other, abs=1e-4)
    assert (choice["text"], choice["finish_reason"]) == (expected["text"], expected["finish_reason"])
    lines = server.post(**asked, stream=True).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    assert len(events) >= whole["usage"]["completion_tokens"]


def test_several_texts_of_several_prompts(served: tuple[LiveServer, TrainedModel, Speculation]) -> None:
    server, trained, speculation = served
    answer = server.post(prompt=PROMPTS[1:3], n=3, seed=5, max_tokens=12, temperature=2.0).json()
    requests = [
        {"prompt": prompt, "max_tokens": 12, "temperature": 2.0, "seed": seed}
        for prompt in PROMPTS[1:3]
        for seed in (5, 6, 7)
    ]
    assert [choice["text"] for choice in answer["choices"]] == [
        alone(trained, speculation, request, []) for request in requests
    ]


def test_a_failure_leaves_the_server_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch and the state of its proposer begin anew."""
    trained, speculation = untrained(DEPTHS)
    trained = TrainedModel(**{**vars(trained), "tokenizer": Endless(trained.tokenizer)})
    asked = {"prompt": PROMPTS[1], "max_tokens": 20, "temperature": 3.0, "seed": 1}
    with live_server(trained, speculation=speculation) as server:
        before = server.post(**asked).json()["choices"]
        hidden, calls = trained.model.hidden, 0

        def failing(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise RuntimeError("no memory")
            return hidden(*arguments)

        monkeypatch.setattr(trained.model, "hidden", failing)
        assert server.post(**asked).status_code == 500
        assert server.post(**asked).json()["choices"] == before
        assert calls > 5
