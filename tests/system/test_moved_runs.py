"""Runs that were moved, renamed, or are used from another folder: verbs find what they need, or say in one line what it is."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from overtok_megatron.checkpoint.store import find_checkpoint, read_manifest
from overtok_megatron.cli import main
from overtok_megatron.config.loading import load_config, save_resolved
from overtok_megatron.config.moved_runs import run_of
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.run_data import open_run_data
from overtok_megatron.data.tokenizers.kept import keep_tokenizer
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.evaluation.adapter import OvertokLM
from overtok_megatron.inference.loading import load_trained
from overtok_megatron.interchange.sample_text import SAMPLE_TEXT
from overtok_megatron.launching.preparation import load_run
from support.expect_error import command_error
from support.hugging_face_models import over_encoded_run
from support.overtok_process import run_overtok
from support.prefixed_tokenizers import save_prefixed

TOKENIZER, SET = "data/tokenizer.model", "data/held"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything is relative: data/, and the run runs/a."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "data").mkdir()
    save_prefixed(folder / "data")
    (folder / "text.txt").write_text(SAMPLE_TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare([Path("text.txt")], SET, load_tokenizer("sentencepiece", TOKENIZER))
        data = {"train": [{"path": SET, "weight": 1.0}], "validation": {"held": SET}}
        config = over_encoded_run(Path("runs/a"), Path(TOKENIZER), {}, {"ngram_order": 2, "num_slices": 1}, data)
        save_resolved(config, "runs/a/config.yaml")
        keep_tokenizer(config.tokenizer, Path("runs/a"))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, used from another folder, which holds nothing."""
    shutil.copytree(original, tmp_path / "work")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "work"


def renamed(folder: Path) -> Path:
    return (folder / "runs" / "a").rename(folder / "runs" / "b")


def moved(folder: Path) -> Path:
    """To where nothing of its data is."""
    archive = folder.parent / "archive"
    archive.mkdir()
    return (folder / "runs" / "a").rename(archive / "old")


def use(run: Path, *tokenizer: str) -> None:
    """Everything that needs the tokenizer, and no data."""
    assert main(["generate", str(run), "--prompt", "the state", "--max-new-tokens", "4", *tokenizer]) == 0
    assert main(["export", str(run), "--output", "exported", "--no-check", *tokenizer]) == 0
    assert main(["grow", str(run), "--output", "grown", "--tables", "orders=3,rows=2003", *tokenizer]) == 0
    assert main(["generate", "grown", "--prompt", "the state", "--max-new-tokens", "4"]) == 0
    kept = read_manifest(find_checkpoint(Path("grown"))).tokenizer_fingerprint
    assert load_tokenizer("sentencepiece", "grown/tokenizer.model").fingerprint() == kept
    assert OvertokLM(run=str(run), tokenizer=tokenizer[1] if tokenizer else None).eot_token_id == 0


@pytest.mark.parametrize(
    ("how", "kept"), [("seen from another folder", True), ("renamed", False)], ids=["other folder", "renamed"]
)
def test_everything_is_found(folder: Path, capsys: pytest.CaptureFixture[str], how: str, kept: bool) -> None:
    run = renamed(folder) if how == "renamed" else folder / "runs" / "a"
    if not kept:  # as of a run of earlier releases
        (run / "tokenizer.model").unlink()
    use(run)
    assert main(["evaluate", str(run)]) == 0
    assert "held" in capsys.readouterr().out
    assert main(["prepare", str(folder / "text.txt"), "--tokenizer", str(run), "--output", "again"]) == 0
    told: list[str] = []
    config = load_run(str(run / "config.yaml"), [], told.append).config
    assert [f"lies in {run}" in line for line in told] == [True]
    assert config.training.output_directory == str(run)
    assert open_run_data(config).eod_id == 0  # the sets and the tokenizer of a training that goes on


def test_a_run_alone_has_its_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = moved(folder)
    shutil.rmtree(folder)
    use(run)
    assert (
        main(["prepare", str(run / "config.yaml"), "--format", "text", "--tokenizer", str(run), "--output", "b"]) == 0
    )
    assert SET in command_error(capsys, "evaluate", str(run))
    assert main(["evaluate", str(run), "--data", "b"]) == 0


def test_what_is_not_found_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = moved(folder)
    (run / "tokenizer.model").unlink()
    for verb in (
        ["generate", str(run), "--prompt", "x"],
        ["evaluate", str(run)],
        ["export", str(run), "--output", "x"],
    ):
        line = command_error(capsys, *verb)
        assert TOKENIZER in line and str(run / "tokenizer.model") in line and "--tokenizer" in line
        assert len(line) < 300 + 2 * len(str(run))
    assert (
        main(["export", str(run), "--output", "x", "--tokenizer", str(folder / TOKENIZER)]) == 0
    )  # logits are compared
    other = Path("other.model")
    other.write_bytes((folder / TOKENIZER).read_bytes() + b"\0")
    for verb in (["generate", str(run), "--prompt", "x"], ["serve", str(run)], ["evaluate", str(run)]):
        assert "not the tokenizer" in command_error(capsys, *verb, "--tokenizer", "other.model")
    shutil.copyfile(other, run / "tokenizer.model")
    assert "not the tokenizer" in command_error(capsys, "generate", str(run), "--prompt", "x")
    assert (
        main(["generate", str(run), "--prompt", "x", "--max-new-tokens", "2", "--tokenizer", str(folder / TOKENIZER)])
        == 0
    )


def test_another_file_of_the_name_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of the same name in the current folder is not the run's; its own copy is."""
    Path("data").mkdir()
    Path(TOKENIZER).write_bytes(b"something else")
    trained = load_trained(folder / "runs" / "a", torch.device("cpu"))
    assert trained.config.tokenizer.path == str(folder / "runs" / "a" / "tokenizer.model")
    assert trained.config.data.validation == {"held": str(folder / SET)}
    monkeypatch.chdir(folder)
    assert load_trained(Path("runs/a"), torch.device("cpu")).config.tokenizer.path == TOKENIZER


def test_an_imported_run_is_renamed(folder: Path) -> None:
    assert main(["export", str(folder / "runs" / "a"), "--output", "hf", "--no-check"]) == 0
    assert main(["import", "hf", "--output", "runs/a", "--no-check"]) == 0
    Path("runs/a").rename("runs/b")
    assert main(["generate", "runs/b", "--prompt", "x", "--max-new-tokens", "2"]) == 0
    assert main(["export", "runs/b", "--output", "hf2", "--no-check"]) == 0


def test_a_kept_tokenizer_takes_no_others_place(folder: Path) -> None:
    run, mine = folder / "runs" / "a", b"mine"
    section = load_config(run / "config.yaml").config.tokenizer
    (run / "tokenizer.model").write_bytes(mine)
    keep_tokenizer(section.model_copy(update={"path": str(folder / TOKENIZER)}), run)
    assert (run / "tokenizer.model").read_bytes() == mine
    assert run_of(run / "checkpoints" / "step_00000000") == run
    assert run_of(run) is None


def test_a_users_configuration_stays_as_it_is(folder: Path) -> None:
    """Only a run's own config.yaml is read by where it lies."""
    own = folder / "runs" / "a" / "config.yaml"
    mine = Path("mine.yaml")
    mine.write_text(own.read_text())
    told: list[str] = []
    assert load_run(str(mine), [], told.append) == load_config(mine)
    other = ["training.output_directory=other"]
    assert load_run(str(own), other, told.append) == load_config(own, other)
    heir = folder / "runs" / "a" / "heir.yaml"
    heir.write_text("base: config.yaml\n")
    assert load_run(str(heir), [], told.append).config.training.output_directory == "runs/a"
    assert not told


@pytest.mark.slow
def test_a_moved_run_goes_on(folder: Path) -> None:
    """Trained in one folder with relative paths, renamed, and gone on with from another."""
    values = yaml.safe_load((folder / "runs" / "a" / "config.yaml").read_text())
    values["training"] |= {"output_directory": "runs/t", "train_iters": 2, "validation_interval": 2, "num_threads": 1}
    values["logging"] = {"tensorboard": False}
    (folder / "t.yaml").write_text(yaml.safe_dump(values))
    code, output = run_overtok("train", "t.yaml", "--processes", "1", cwd=folder)
    assert code == 0, output
    assert (folder / "runs/t/tokenizer.model").read_bytes() == (folder / TOKENIZER).read_bytes()
    run = (folder / "runs" / "t").rename(folder / "runs" / "u")
    (folder / TOKENIZER).unlink()
    code, output = run_overtok("train", run / "config.yaml", "training.train_iters=4", "--processes", "1")
    assert code == 0, output
    assert "resumed from" in (run / "train.log").read_text()
    assert (run / "checkpoints" / "latest").read_text() == "step_00000004"
    assert not (folder / "runs" / "t").exists() and not Path("runs").exists()
