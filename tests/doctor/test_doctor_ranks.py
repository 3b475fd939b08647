"""`overtok doctor` in real processes: two hosts by name on one machine, this host alone, a hostfile, and a broken rank."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.launching.console import overtok_command
from overtok_megatron.launching.local import free_port
from support.expect_error import command_error

CONFIG = """
model: {{vocab_size: 257, hidden_size: 32, intermediate_size: 48, num_layers: 2, num_attention_heads: 2}}
tokenizer: {{type: bytes}}
data: {{train: {folder}/train, seq_length: 16}}
optimizer: {{learning_rate: 3e-3}}
training: {{output_directory: {folder}/runs/one, micro_batch_size: 1, global_batch_size: 2, train_iters: 2}}
"""
FAKE_SSH = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if words[:2] != ["-o", "Port=2222"]:
    sys.exit("the caller's options come first")
while words[0] == "-o":
    words = words[2:]
host, command = words
if host == "c":
    sys.exit(print("ssh: connect to host c port 22: Connection refused", file=sys.stderr) or 255)
if host == "d" and "one_host" in command:
    sys.exit("ImportError: a broken torch")
os.execv("/bin/sh", ["sh", "-c", command])
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run whose dataset a second folder holds as well, with other tokens."""
    for name, text in (("train", "abc " * 99), ("other", "def " * 99)):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
        prepare([tmp_path / f"{name}.txt"], tmp_path / name, ByteTokenizer())
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(folder=tmp_path), encoding="utf-8")
    return path


@contextmanager
def ranks(*commands: list[object], **variables: str) -> Iterator[list[subprocess.Popen[str]]]:
    """One rank per command, as a launcher starts them; all are killed when the block ends."""
    port, started = free_port(), []
    for rank, words in enumerate(commands):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(len(commands)),
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NCCL_DEBUG": f"RANK{rank}",
        }
        started.append(
            subprocess.Popen(
                overtok_command("doctor", *words),
                env=environment | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    try:
        yield started
    finally:
        for process in started:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.communicate()


def without_links(findings: list[str]) -> list[str]:
    """Two processes of a busy machine may find each other slow."""
    return [line for line in findings if "link" not in line]


def test_two_hosts_that_differ_are_told_apart(config: Path, tmp_path: Path) -> None:
    other = [f"data.train={tmp_path}/other", "training.train_iters=3"]
    with ranks(
        [config, "--host-name", "a", "--json", tmp_path / "report.json"], [config, *other, "--host-name", "b"]
    ) as (first, second):
        text, errors = first.communicate(timeout=100)
        second.communicate(timeout=100)
    assert first.returncode == 1, errors
    assert second.returncode == 0
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert without_links(report["findings"]) == [
        "environments differ: host b has NCCL_DEBUG RANK1, host a RANK0",
        f"configurations differ: host b has data.train '{tmp_path}/other', host a '{tmp_path}/train'",
        "configurations differ: host b has training.train_iters 3, host a 2",
        *[line for line in report["findings"] if line.startswith("data differ: ")],
    ]
    assert [line.split(" SHA")[0] for line in report["findings"] if line.startswith("data differ")] == [
        f"data differ: host b has {tmp_path}/train nothing, host a 397 tokens in 1 documents, "
        f"{report_size(tmp_path / 'train')} bytes,",
        f"data differ: host b has {tmp_path}/other 397 tokens in 1 documents, {report_size(tmp_path / 'other')} bytes,",
    ]
    assert report["folder"].endswith("read and written by all")
    assert not (tmp_path / "runs").exists()
    (link,) = report["links"]
    assert (link["first"]["host"], link["second"]["host"], link["failure"]) == ("a", "b", "")
    assert link["latency"] > 0
    assert min(link["rates"]) > 1e6
    assert report["all_reduces"]["gloo"]["rate"] > 1e6
    clock = report["clocks"]["b"]
    assert abs(clock["seconds"]) <= clock["error"] + 1e-3  # one machine, one clock
    for line in report["findings"]:
        assert f"  {line}\n" in text


def report_size(prefix: Path) -> str:
    return f"{sum(Path(f'{prefix}{ending}').stat().st_size for ending in ('.bin', '.idx', '.json')):,}"


def test_a_wrong_configuration_is_a_users_mistake(config: Path) -> None:
    done = subprocess.run(
        overtok_command("doctor", config, "training.seeds=1"), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "training.seeds" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_report_that_cannot_be_written_is_told_before_the_examination(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts, text = tmp_path / "hosts", config.read_text(encoding="utf-8")
    hosts.write_text("nowhere slots=1\n", encoding="utf-8")
    for words, told in (
        (["--json", tmp_path], f"--json: {tmp_path}: cannot be written (Is a directory); name a file"),
        (["--json", tmp_path / "none" / "report.json"], "cannot be written (No such file or directory)"),
        (["--json", config], "is an input, and"),
        (["--hostfile", hosts, "--json", hosts], "is an input, and"),
        (["--hostfile", hosts, "--json", tmp_path], "cannot be written (Is a directory)"),
    ):
        assert told in command_error(capsys, "doctor", config, *words)
    assert config.read_text(encoding="utf-8") == text


@pytest.mark.ci
def test_this_host_alone_is_all_right() -> None:
    done = subprocess.run(overtok_command("doctor", "--json", "-"), capture_output=True, text=True, timeout=200)
    report = json.loads(done.stdout)
    assert without_links(report["findings"]) == []
    assert [host["ranks"] for host in report["hosts"]] == [[0, 1]]
    assert done.returncode == (1 if report["findings"] else 0)


@pytest.mark.ci
def test_the_hosts_of_a_file_that_cannot_take_part_are_named(tmp_path: Path) -> None:
    (tmp_path / "ssh").write_text(FAKE_SSH, encoding="utf-8")
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\nc slots=2\nd slots=2\n", encoding="utf-8")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"PDSH_SSH_ARGS_APPEND": "-o Port=2222"}
    command = overtok_command(
        "doctor", "--hostfile", tmp_path / "hosts", "--wait", 30, "--json", tmp_path / "report.json"
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [host["name"] for host in report["hosts"]] == ["a", "b"]
    assert without_links(report["findings"]) == [
        "host c: is not reached by ssh (ssh: connect to host c port 22: Connection refused); can you run `ssh c true`?",
        "host d: its ranks ended with code 1 (ImportError: a broken torch)",
    ]


@pytest.mark.ci
def test_a_rank_that_stops_is_named_and_the_report_still_comes(tmp_path: Path) -> None:
    names = [["--host-name", name, "--json", tmp_path / "report.json"] for name in "abc"]
    with ranks(*names, NCCL_DEBUG="WARN") as (first, second, third):
        assert first.stderr is not None
        assert "links" in next(first.stderr)
        os.killpg(third.pid, signal.SIGSTOP)
        first.communicate(timeout=220)
        second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (1, 0)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["findings"][0] == "host c: no answer within 45 s; it stopped answering at: links over gloo"
    good = [link for link in report["links"] if not link["failure"]]
    assert [(link["first"]["host"], link["second"]["host"]) for link in good] == [("a", "b")]
    assert report["all_reduces"]["gloo"]["rate"] > 0
