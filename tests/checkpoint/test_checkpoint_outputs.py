"""Verbs that write models: what they refuse to write over, the modes of their files, and inputs with byte-order marks."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from overtok_megatron.checkpoint.store import find_checkpoint
from overtok_megatron.cli import main
from overtok_megatron.config.loading import load_config
from support.expect_error import command_refusal
from support.hugging_face_models import random_models, save_tokenizer
from support.trained_runs import TrainedRuns

TABLES = ["--tables", "orders=2,rows=1009", "over_encoding.collision_check=warn"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "llama"
    random_models()["llama"].save_pretrained(folder, max_shard_size="60KB")
    save_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def modes(folder: Path) -> set[int]:
    """Who may read and write; DeepSpeed makes a script of its own executable."""
    return {path.stat().st_mode & 0o666 for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("narrow_umask")
def test_every_file_follows_the_umask(llama: Path, trained_runs: TrainedRuns, tmp_path: Path) -> None:
    run, grown, copy = trained_runs.run("fp32"), tmp_path / "grown", tmp_path / "reshaped"
    assert main(["import", str(llama), "--output", str(tmp_path / "run")]) == 0
    for source, output in ((run, "over"), (tmp_path / "run", "plain")):
        assert main(["export", str(source), "--output", str(tmp_path / output), "--no-check"]) == 0
    assert main(["grow", str(run), "--output", str(grown), *TABLES]) == 0
    assert main(["checkpoint", "reshape", str(run), "--output", str(copy)]) == 0
    for output in ("run", "over", "plain", "grown", "reshaped"):
        assert modes(tmp_path / output) == {0o640}, output
    assert modes(run) == modes(trained_runs.folder) == {0o644}  # made by the trainer, under the usual one


def test_outputs_that_are_somebody_elses(
    llama: Path, trained_runs: TrainedRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_runs.run("fp32")
    (tmp_path / "file").write_text("a user's own")
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "thesis.txt").write_text("a user's own")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_text("model: {}  # a user's own")
    for verb in (["import", llama], ["export", run], ["grow", run, *TABLES]):
        assert "file: is there already and is not a folder" in command_refusal(
            tmp_path, capsys, *verb, "--output", tmp_path / "file"
        )
        assert "configs: is not empty" in command_refusal(tmp_path, capsys, *verb, "--output", tmp_path / "configs")
    line = command_refusal(tmp_path, capsys, "export", run, "--output", tmp_path / "model")
    assert "model.partial: is there already and is not what a killed call left" in line


def test_reshape_does_not_replace_another_runs_checkpoint(
    trained_runs: TrainedRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained_runs.run("bf16"), other)
    step = find_checkpoint(other).name
    line = command_refusal(tmp_path, capsys, "checkpoint", "reshape", trained_runs.run("fp32"), "--output", other)
    assert f"{step}: is there already; remove it, or name another --output" in line
    shutil.copytree(trained_runs.run("fp32"), tmp_path / "own")
    assert main(["checkpoint", "reshape", str(tmp_path / "own")]) == 0  # in place
    assert main(["checkpoint", "verify", str(tmp_path / "own")]) == 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_foreign_files_with_marks(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    plain = (source / name).read_bytes()
    (source / name).write_text(plain.decode(), encoding="utf-16")
    assert "UTF-16 by its byte-order mark" in command_refusal(
        source, capsys, "import", source, "--output", tmp_path / "run"
    )
    (source / name).write_bytes(b"\xef\xbb\xbf" + plain)
    check = ["--no-check"] if name == "model.safetensors.index.json" else []  # transformers does not read it
    assert main(["import", str(source), "--output", str(tmp_path / "marked"), *check]) == 0
    assert main(["import", str(llama), "--output", str(tmp_path / "usual"), "--no-check"]) == 0
    marked, usual = (load_config(tmp_path / run / "config.yaml").config for run in ("marked", "usual"))
    assert marked.model == usual.model
    assert marked.tokenizer.eod_token == usual.tokenizer.eod_token is not None
    assert main(["export", str(tmp_path / "marked"), "--output", str(tmp_path / "back")]) == 0
    assert not (tmp_path / "back" / name).exists() or (tmp_path / "back" / name).read_bytes()[0] == ord("{")
