"""Every mistake of a user ends in one line that names it, and a non-zero exit code; nothing is lost by it."""

import hashlib
import resource
import shutil
from pathlib import Path

import pytest

from overtok_megatron.cli import main
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.sotu import sotu_files
from support.expect_error import command_error
from support.overtok_process import run_overtok
from support.workspace import Workspace


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.hiden_size=64", ["command line", "model.hiden_size", "did you mean model.hidden_size?"]),
        ("optimiser.learning_rate=1", ["optimiser", "did you mean optimizer"]),
        ("model.learning_rate=1", ["did you mean optimizer.learning_rate?"]),
        ("model.num_layers=two", ["model.num_layers", "'two'", "integer"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate", "-1", "greater than 0"]),
        ("training.precision=fp8", ["training.precision", "'fp8'", "'bf16' or 'fp32'"]),
        ("model.num_attention_heads=3", ["model.num_attention_heads", "3", "hidden_size 32", "2 does"]),
        ("training.global_batch_size=10", ["training.global_batch_size", "10", "multiple", "8 is"]),
        ("over_encoding.num_slices=3", ["over_encoding.num_slices", "6 tables", "hidden_size 32"]),
        ("over_encoding.table_rows=51200", ["over_encoding.table_rows", "100.00", "is a good size nearby"]),
        ("parallel.sequence_parallel=true", ["parallel.sequence_parallel", "write false"]),
        (
            "deepspeed.train_batch_size=8",
            ["deepspeed.train_batch_size", "contradicts 16", "training.global_batch_size"],
        ),
        ("data.train=nowhere/train", ["nowhere/train.bin", "no such file", "overtok prepare"]),
        ("tokenizer.path=nowhere.model", ["nowhere.model", "no such file"]),
        ("model.vocab_size=500", ["512 pieces", "model.vocab_size is 500", "model.vocab_size=512"]),
        ("training.kernels=apex", ["training.kernels", "no CUDA device"]),
        ("nonsense", ["nonsense", "section.key=value"]),
    ],
)
def test_configuration(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], override: str, expected: list[str]
) -> None:
    line = command_error(capsys, "train", str(workspace.config("run")), override, "--processes", "1")
    for part in expected:
        assert part in line
    assert not (workspace.scratch / "run" / "checkpoints").exists()


@pytest.mark.parametrize("part", [".bin", ".idx", ".json"])
def test_truncated_dataset(workspace: Workspace, capsys: pytest.CaptureFixture[str], part: str) -> None:
    for path in workspace.data.glob("train.*"):
        shutil.copy(path, workspace.scratch)
    damaged = workspace.scratch / f"train{part}"
    damaged.write_bytes(damaged.read_bytes()[:-6])
    line = command_error(
        capsys, "train", str(workspace.config("run")), f"data.train={workspace.scratch}/train", "--processes", "1"
    )
    assert str(damaged) in line
    assert "overtok prepare" in line


def test_corpus(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = str(workspace.data / "tokenizer.model")
    target = workspace.scratch / "set"
    empty = workspace.scratch / "empty"
    empty.mkdir()
    prepare = ("prepare", str(empty), "--tokenizer", tokenizer, "--output", str(target))
    assert "empty" in command_error(capsys, *prepare)
    latin = empty / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    line = command_error(capsys, *prepare)
    assert str(latin) in line
    assert "UTF-8 at byte 3" in line
    assert not list(workspace.scratch.glob("set*"))
    text = empty / "latin.txt"
    text.write_text("a few words", encoding="utf-8")
    line = command_error(capsys, "train-tokenizer", str(empty), "--vocab-size", "8192", "--output", str(target))
    assert "8192" in line
    assert "missing" in command_error(capsys, "prepare", "missing", "--tokenizer", tokenizer, "--output", str(target))


def test_a_trained_run(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """One short run, then everything that can be wrong with using it, ending with a disk that fills up."""
    config = str(workspace.config("run", optimizer="rowwise_adagrad"))
    run = workspace.scratch / "run"
    train = ("train", config, "--processes", "1")
    code, output = run_overtok(*train, "training.train_iters=4")
    assert code == 0, output

    generate = ("generate", str(run), "--prompt")
    assert main((*generate, "The people", "--max-new-tokens", "4")) == 0
    assert capsys.readouterr().out.startswith("The people")
    line = command_error(capsys, *generate, "The people of the United States " * 9)
    assert "context of 16 tokens" in line
    assert "temperature" in command_error(capsys, *generate, "x", "--temperature", "-1")
    assert "no checkpoint" in command_error(capsys, "generate", str(workspace.scratch), "--prompt", "x")

    for override, words in (
        ("model.num_layers=3", ["model.num_layers is 2 there and 3 in this run"]),
        ("over_encoding.optimizer=adam", ["over_encoding.optimizer"]),
    ):
        code, output = run_overtok(*train, override)
        errors = [line for line in output.splitlines() if line.startswith("error")]
        assert code != 0
        assert len(errors) == 1, output
        assert "Traceback" not in output
        for word in words:
            assert word in errors[0]

    other = workspace.scratch / "other.model"
    train_sentencepiece(sotu_files()[3:8], 512, other)
    manifest = run / "checkpoints" / "step_00000004" / "manifest.json"
    original = manifest.read_text()
    changed = original.replace(str(workspace.data / "tokenizer.model"), str(other))
    manifest.write_text(changed)
    assert "manifest.sha256: does not fit manifest.json" in command_error(capsys, *generate, "x")
    digest = manifest.with_name("manifest.sha256")
    kept = digest.read_text()
    digest.write_text(f"{hashlib.sha256(changed.encode()).hexdigest()}  manifest.json\n")
    assert main((*generate, "x", "--max-new-tokens", "4")) == 0  # the run's folder holds the right one
    assert "not the tokenizer" in command_error(capsys, *generate, "x", "--tokenizer", str(other))
    copy = (run / "tokenizer.model").read_bytes()
    (run / "tokenizer.model").write_bytes(other.read_bytes())
    assert "not the tokenizer" in command_error(capsys, *generate, "x")
    (run / "tokenizer.model").write_bytes(copy)
    manifest.write_text(original)
    digest.write_text(kept)

    weights = next((run / "checkpoints" / "step_00000004" / "tables").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert f"{weights}: SHA-256 differs" in command_error(capsys, *generate, "x")
    assert f"{weights}: SHA-256 differs" in command_error(capsys, "checkpoint", "verify", str(run))
    weights.write_bytes(content)
    assert main(("checkpoint", "verify", str(run))) == 0
    assert "step_00000004: as it was written" in capsys.readouterr().out

    full_disk(workspace, train, run)


def full_disk(workspace: Workspace, train: tuple[str, ...], run: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))  # less than one table file

    code, output = run_overtok(*train, preexec_fn=limit)
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert code != 0
    assert len(errors) == 1, output
    assert "could not save step 8 on rank 0" in errors[0]
    assert "earlier checkpoints are intact" in errors[0]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000004"
    assert [path.name for path in (run / "checkpoints").glob("step*")] == ["step_00000004"]
    code, output = run_overtok(*train)
    assert code == 0, output
    assert (run / "checkpoints" / "latest").read_text() == "step_00000012"
