"""`overtok serve` as a process, and `overtok generate --interactive` on a terminal."""

import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from overtok_megatron.cli import main
from overtok_megatron.inference import generation
from overtok_megatron.inference.generation import generate
from overtok_megatron.inference.sampling import Sampling
from overtok_megatron.serving.server import is_loopback, open_socket
from support.overtok_process import start_overtok
from support.trained_runs import TrainedRuns


def test_sigterm_lets_an_answer_end(trained_runs: TrainedRuns) -> None:
    process = start_overtok(
        *("serve", trained_runs.run("bf16"), "--storage", "mapped", "--host", "0.0.0.0", "--port", "0"),
        *("--model-name", "mine", "--prefill-chunk", "2"),
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"mine \(step 20\) at http://0\.0\.0\.0:(\d+)/v1/completions\n", line)
        assert found, (line, process.stderr.read() if process.poll() is not None and process.stderr else "")
        request = {"model": "mine", "prompt": "The people", "max_tokens": 50, "temperature": 0, "stream": True}
        url = f"http://127.0.0.1:{found[1]}/v1/completions"
        with httpx.stream("POST", url, json=request, timeout=60) as stream:
            lines = stream.iter_lines()
            text = json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
            process.send_signal(signal.SIGTERM)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        text += "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert errors.startswith("warning: 0.0.0.0 may be reached from other machines")
    assert len(errors.splitlines()) == 1
    assert text == generate(trained_runs.trained("bf16"), ["The people"], Sampling(max_new_tokens=50))[0]


def test_an_address_that_cannot_be_had(trained_runs: TrainedRuns, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("serve", str(trained_runs.run("fp32")), "--host", "192.0.2.1")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --host 192.0.2.1 --port 8000: cannot be listened on")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("host", "own"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
                                           ("10.0.0.1", False), ("example.org", False), ("::", False)])  # fmt: skip
def test_loopback(host: str, own: bool) -> None:
    assert is_loopback(host) == own


def test_tokens_are_sent_at_once() -> None:
    with open_socket("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP  # what makes asyncio set TCP_NODELAY


def test_a_conversation(
    trained_runs: TrainedRuns, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts from the terminal; Ctrl-C at the prompt and in a text; a prompt that is too long; Ctrl-D."""
    trained = trained_runs.trained()
    lines = iter(["The people", KeyboardInterrupt(), "", "of the " * 60, "interrupt", "We", EOFError()])

    def typed(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    stream_tokens = generation.stream_tokens

    def interrupted(model: object, prompts: list[list[int]], *settings: Any) -> Iterator[list[list[int]]]:
        for count, tokens in enumerate(stream_tokens(model, prompts, *settings)):
            if count == 3 and prompts == [trained.tokenizer.encode("interrupt")]:
                raise KeyboardInterrupt
            yield tokens

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(generation, "stream_tokens", interrupted)
    assert main(("generate", str(trained_runs.run("fp32")), "--interactive", "--max-new-tokens", "20")) == 0
    printed = capsys.readouterr().out
    first, second = (generate(trained, [prompt], Sampling(max_new_tokens=20))[0] for prompt in ("The people", "We"))
    assert printed.startswith(first + "\n\nerror: prompt 1: ")
    assert printed.endswith(" [stopped]\n" + second + "\n\n")


def test_prompts_or_a_conversation(trained_runs: TrainedRuns, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--interactive", "--prompt", "x"]):
        assert main(("generate", str(trained_runs.run("fp32")), *arguments)) == 2
        assert "give --prompt, or --interactive" in capsys.readouterr().err
