"""Requests that are wrong, too large, too slow or given up: each is answered in a line or dropped, and the server goes on."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overtok_megatron.inference.continuous_batch import ContinuousBatch
from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.inference.sampling import Sampling
from overtok_megatron.serving import server as server_module
from overtok_megatron.serving.scheduler import BatchScheduler, BusyError, SequenceRequest, TokenDelta
from support.live_server import LiveServer, live_server
from support.small_models import Endless
from support.trained_runs import TrainedRuns

JSON = {"content-type": "application/json"}
GOOD = {"model": "tiny", "prompt": "The people", "max_tokens": 4}


@pytest.fixture(scope="module")
def trained(trained_runs: TrainedRuns) -> TrainedModel:
    return trained_runs.trained()


@pytest.fixture(scope="module")
def server(trained: TrainedModel) -> Iterator[LiveServer]:
    with live_server(trained) as server:
        before = server.post(prompt="The people", temperature=0).json()["choices"]
        yield server
        server.wait_idle()
        assert server.post(prompt="The people", temperature=0).json()["choices"] == before


def with_value(key: str, values: list[str]) -> list[bytes]:
    """Bodies with a key set to raw JSON."""
    rest = {name: value for name, value in GOOD.items() if name != key}
    return [f'{json.dumps(rest)[:-1]}, "{key}": {value}}}'.encode() for value in values]


WRONG = [
    "true",
    '"x"',
    "[]",
    "{}",
    "[null]",
    "-1",
    "1.5",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 400,
    "9" * 4500,
]
BODIES = [
    b"", b"{", b"[]", b"null", b"1", b'"text"', b"\xff\xfe", b'{"model": "\xc3"}', b"{}" * 2, b"\x00", b"{'a': 1}",
    b"[" * 4900, b'{"a":' * 900, b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}", b"nul", b'{"model"}', b"\xef\xbb\xbf{}",
    *with_value("max_tokens", [*WRONG, "100", "0", "2147483648"]),
    *with_value("temperature", [v for v in WRONG if v not in ("1.5",)] + ["1001"]),
    *with_value("top_p", [*WRONG, "0", "1.1"]),
    *with_value("top_k", WRONG),
    *with_value("n", [*WRONG, "0", "9", "128", "129"]),
    *with_value("seed", [v for v in WRONG if v != "-1"]),
    *with_value("stop", [v for v in WRONG if v not in ('"x"', "[]")]),
    *with_value("stop", ['""', '["a","b","c","d","e"]', f'"{"s" * 257}"', "[1]"]),
    *with_value("stream", [v for v in WRONG if v != "true"]),
    *with_value("echo", [v for v in WRONG if v != "true"]),
    *with_value("logprobs", [*WRONG, "6"]),
    *with_value("model", [*WRONG, "null", '"../tiny"', '"TINY"', '"\\ud800"', '"\\u0000"']),
    *with_value("prompt", ["true", "{}", "[]", "null", '""', "[[]]", "[1.5]", "[true]", "[-1]", "[512]", "[1e3]", '["a", 1]',
                           '[1, "a"]', '["a", null]', '[["a"]]', '"\\ud800"', '"a\\udfff"', "[99999999999999999999]", "NaN",
                           f'"{"a b " * 300}"', f"[{','.join(['5'] * 100)}]", f"[{','.join(['[5]'] * 9)}]"]),
    *with_value("stream_options", ["{}", "1", '{"include_usage": 1}', '{"other": true}']),
    *with_value("best_of", ["2", "true"]),
    *with_value("suffix", ['"x"']),
    *with_value("presence_penalty", ["0.1", "NaN"]),
    *with_value("logit_bias", ['{"5": 1}', "[]"]),
    *with_value("__class__", ["1"]),
    *with_value("\\ud800", ["1"]),
]  # fmt: skip


def test_malformed_bodies(server: LiveServer) -> None:
    """Each gets a refusal as the API words them, and none is a failure of the server."""
    assert len(BODIES) >= 200
    with httpx.Client(base_url=server.url, headers=JSON, timeout=30) as client:
        for body in BODIES:
            response = client.post("/v1/completions", content=body)
            assert response.status_code in (400, 404), (body[:200], response.text)
            error = response.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["message"]
            assert "\n" not in error["message"]
            assert len(error["message"]) < 400


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)
KEYS = [
    *(
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "stream",
        "logprobs",
        "echo",
        "user",
        "top_k",
    ),
    *("best_of", "suffix", "logit_bias", "stream_options"),
]


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), anything, max_size=4))
def test_whatever_json_there_is(server: LiveServer, values: dict[str, Any]) -> None:
    response = httpx.post(
        f"{server.url}/v1/completions", content=json.dumps({**GOOD, **values}), headers=JSON, timeout=30
    )
    assert response.status_code in (200, 400, 404), response.text


def exchange(server: LiveServer, parts: list[bytes], pause: float = 0.0) -> bytes:
    """What the server says to raw bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        except OSError:
            pass  # it may close while we still send
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionError:
            pass
    return received


def head(length: str, path: str = "/v1/completions") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([head("Content-Length: 6000"), b"x" * 6000], b"413"),
        ([head("Content-Length: 99999999999"), b"x" * 200_000], b"413"),
        ([head("Transfer-Encoding: chunked"), *[b"1000\r\n" + b"x" * 4096 + b"\r\n"] * 2], b"413"),
        ([head("Transfer-Encoding: chunked"), b"4\r\n{\"a\"\r\n"], b"408"),  # and never an end
        ([head("Content-Length: 100"), b"{"], b"408"),
        ([head("Transfer-Encoding: chunked"), b"zz\r\n"], b"400"),
        ([head("Content-Length: -5"), b"{}"], b"400"),
        ([head("Content-Length: 5\r\nContent-Length: 6"), b"{}"], b"400"),
        ([head("X-Large: " + "y" * 200_000)], b"400"),
        ([head("\r\n".join(f"X-{index}: y" for index in range(20_000)))], b"400"),
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50 + b"\r\n\r\n"], b"400"),
        ([b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n"], b"400"),
        ([b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n"], b"400"),
        ([b"GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"], b"404"),
        ([b"GET /health HTTP/1.1\r\nHost: attacker.example\r\nConnection: close\r\n\r\n"], b"400"),
        ([b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"], b"405"),
        ([head("Content-Length: 2\r\nConnection: close").replace(b"application/json", b"text/plain"), b"{}"], b"415"),
    ],
)  # fmt: skip
def test_raw_bytes(server: LiveServer, parts: list[bytes], status: bytes) -> None:
    answer = exchange(server, parts)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:300]


def test_headers_that_never_end(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_HEADER_SECONDS", 0.3)
    for parts in ([], [b"POST /v1/comp"], [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /hea"]):
        begin = time.monotonic()
        exchange(server, parts, pause=0.15)
        assert time.monotonic() - begin < 4  # uvicorn alone would wait five seconds, or for ever


@pytest.fixture
def slow(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> TrainedModel:
    """Steps of 50 ms, so that a text of 40 tokens takes two seconds."""
    step = ContinuousBatch.step

    def slowly(batch: ContinuousBatch, tokens: list[int]) -> Any:
        time.sleep(0.05)
        return step(batch, tokens)

    monkeypatch.setattr(ContinuousBatch, "step", slowly)
    return replace(trained, tokenizer=Endless(trained.tokenizer))  # no text ends by itself


LONG = {"prompt": "The people", "max_tokens": 40}


def test_clients_that_leave(slow: TrainedModel) -> None:
    """Their slots are free at once for others, whether they were read to or waited."""
    with live_server(slow, max_batch=2) as server:
        for stream in (True, False):
            body = json.dumps({"model": "tiny", **LONG, "n": 2, "stream": stream}).encode()
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head(f"Content-Length: {len(body)}") + body)
                if stream:
                    assert b"data: " in connection.recv(4096) + connection.recv(4096)
                else:
                    time.sleep(0.3)
                assert server.health()["running"] == 2
            begin = time.monotonic()
            server.wait_idle()
            assert time.monotonic() - begin < 1.2  # not the rest of the two seconds
        assert server.post(prompt="The", max_tokens=1).status_code == 200


def test_a_full_queue_and_a_request_that_takes_too_long(slow: TrainedModel) -> None:
    with live_server(slow, max_batch=2, max_waiting=2, seconds=0.8) as server:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.post(**LONG, n=4)))
        thread.start()
        while server.health()["waiting"] < 2:
            time.sleep(0.01)
        busy = server.post(**LONG)
        assert busy.status_code == 429
        assert busy.json()["error"]["code"] == "server_busy"
        assert busy.headers["retry-after"] == "1"
        thread.join()
        assert answers[0].status_code == 504
        assert answers[0].json()["error"]["code"] == "timeout"
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={"model": "tiny", **LONG, "stream": True}
        ) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert len(lines) > 3
        server.wait_idle()


def test_a_model_that_fails(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request fails, and says no more than that; the next is served."""
    with live_server(trained) as server:
        step = ContinuousBatch.step
        monkeypatch.setattr(ContinuousBatch, "step", lambda *_: 1 / 0)
        failed = server.post(prompt="The people")
        assert failed.status_code == 500
        assert "division" not in failed.text
        monkeypatch.setattr(ContinuousBatch, "step", step)
        assert server.post(prompt="The people").status_code == 200
        server.wait_idle()


def test_more_connections_than_allowed(trained: TrainedModel) -> None:
    with live_server(trained, connections=4) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(6)]
        assert httpx.get(f"{server.url}/health").status_code == 503
        for connection in held:
            connection.close()
        time.sleep(0.2)
        assert server.health()["status"] == "ok"


def test_who_gave_up_waiting_takes_no_slot(slow: TrainedModel) -> None:
    delivered: list[tuple[str, TokenDelta]] = []

    def request(name: str, seconds: float = 60.0) -> SequenceRequest:
        deadline = time.monotonic() + seconds
        return SequenceRequest(
            prompt=[5, 6],
            max_new_tokens=30,
            sampling=Sampling(max_new_tokens=30),
            stops=[],
            top_scores=None,
            prompt_scores=False,
            deadline=deadline,
            deliver=lambda delta: delivered.append((name, delta)),
        )

    with BatchScheduler(slow, max_batch=1, max_waiting=1, prefill_chunk=8) as scheduler:
        first, second = request("first"), request("second")
        scheduler.submit([first])
        while not delivered:
            time.sleep(0.01)
        scheduler.submit([second])
        with pytest.raises(BusyError, match="1 sequences wait already"):
            scheduler.submit([request("third")])
        scheduler.cancel([second])
        scheduler.submit([request("late", seconds=0.1)])
        while delivered[-1] != ("late", TokenDelta("", [], 0, "timeout")):
            time.sleep(0.01)
        scheduler.submit([request("last")])
        scheduler.cancel([first])
        while not (delivered[-1][0] == "last" and delivered[-1][1].finish):
            time.sleep(0.01)
    assert delivered[-1][1].finish == "length"
    assert "second" not in [name for name, _ in delivered]
    assert not scheduler.alive
