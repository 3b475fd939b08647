"""A tiny corpus, tokenizer, dataset and configuration on disk, and the console command as a subprocess."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.data.tokenizers.sentencepiece import train_sentencepiece

VOCAB = 512
CONFIG = """
model: {{vocab_size: 512, hidden_size: 32, intermediate_size: 48, num_layers: 2, num_attention_heads: 2}}
over_encoding: {{enabled: true, table_rows: 40_756, init_std: 0, combine: sum, optimizer: {optimizer}}}
tokenizer: {{path: {folder}/tokenizer.model}}
data: {{train: {folder}/train, validation: {folder}/validation, seq_length: 16}}
optimizer: {{learning_rate: 3e-3, warmup_iters: 2}}
training: {{output_directory: {output}, micro_batch_size: 4, global_batch_size: 16, train_iters: 12, validation_interval: 6}}
checkpoint: {{interval: 4, keep_last: 2}}
"""


@dataclass(frozen=True)
class Workspace:
    """Where a test's data lies, and how it runs the command."""

    data: Path
    scratch: Path

    def config(self, name: str, optimizer: str = "adam") -> Path:
        """Write a configuration whose run goes to scratch/name."""
        path = self.scratch / f"{name}.yaml"
        path.write_text(
            CONFIG.format(folder=self.data, output=self.scratch / name, optimizer=optimizer), encoding="utf-8"
        )
        return path

    def start(self, *arguments: str, preexec: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        """The console command, in a session of its own."""

        def prepare_process() -> None:
            os.setsid()
            if preexec is not None:
                preexec()

        command = [sys.executable, "-m", "overtok_megatron.cli", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, preexec_fn=prepare_process)

    def run(self, *arguments: str, preexec: Callable[[], None] | None = None) -> tuple[int, str]:
        """(exit code, output); a run that hangs is killed and fails."""
        process = self.start(*arguments, preexec=preexec)
        try:
            output, _ = process.communicate(timeout=150)
        finally:
            kill_session(process)
        return process.returncode, output


def kill_session(process: subprocess.Popen[str]) -> None:
    """SIGKILL the command and everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the training ranks of a started command."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            group = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[3])  # the session
        except (OSError, IndexError):
            continue
        if (
            group == process.pid
            and b"overtok_megatron.training.entry" in words
            and any(w.startswith(b"--local_rank") for w in words)
        ):
            found.append(int(folder.name))
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Until `condition` holds; fails where the command ends or time runs out first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early:\n{process.stdout.read() if process.stdout else ''}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def records(run: Path) -> list[dict[str, float]]:
    """What a run reported, a dictionary a step."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def losses(run: Path) -> list[tuple[float, float, float | None]]:
    """(step, training loss, validation loss) of every report."""
    return [(r["step"], r["train/loss"], r.get("validation/loss")) for r in records(run)]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and both sets from a few speeches."""
    folder = tmp_path_factory.mktemp("data")
    files = sotu_files()
    train_sentencepiece(files[:6], VOCAB, folder / "tokenizer.model")
    tokenizer = load_tokenizer("sentencepiece", folder / "tokenizer.model")
    prepare(files[:6], folder / "train", tokenizer)
    prepare(files[6:7], folder / "validation", tokenizer)
    return folder


@pytest.fixture
def workspace(data_folder: Path, tmp_path: Path) -> Workspace:
    return Workspace(data_folder, tmp_path)
