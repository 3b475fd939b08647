"""No verb writes over an input, a tokenizer, or what is not ours: one line says so, before any work, and nothing changes."""

import json
import shutil
from pathlib import Path

import pytest

from overtok_megatron.cli import main
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.preparing.prepare import Plan, prepare_sets
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.errors import OutputError
from support.expect_error import command_refusal

BYTES = ["--tokenizer", "bytes", "--workers", "1"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("a text")
    return path


def test_prepare_and_its_own_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "corpus.json"
    path.write_text('{"text":"only copy"}\n')
    (tmp_path / "set.json").symlink_to(path)
    for given in (path, tmp_path / ".." / tmp_path.name / "corpus.json"):
        error = command_refusal(tmp_path, capsys, "prepare", given, *BYTES, "--output", tmp_path / "corpus")
        assert "is an input" in error
    assert "is an input" in command_refusal(tmp_path, capsys, "prepare", path, *BYTES, "--output", tmp_path / "set")
    with pytest.raises(OutputError, match="is an input"):
        prepare_sets([path], tmp_path / "corpus", ByteTokenizer(), Plan())


@pytest.mark.parametrize(
    "suffix", [".json", ".bin", ".idx", ".journal", ".json.partial", ".bin.partial", ".lengths.partial"]
)
@pytest.mark.parametrize("split", [False, True])
def test_prepare_and_what_others_wrote(
    corpus: Path, capsys: pytest.CaptureFixture[str], suffix: str, split: bool
) -> None:
    name = "set" if not split or suffix == ".journal" else "set-validation"
    path = corpus.with_name(name + suffix)
    path.write_text('{"version": "somebody else\'s"}')
    words = ["--split", "0.5", "0.5", "0"] if split else []
    error = command_refusal(
        corpus.parent, capsys, "prepare", corpus, *BYTES, "--output", corpus.with_name("set"), *words
    )
    assert f"{path}: is there already and is not " in error


def test_prepare_and_a_tokenizer(corpus: Path, ab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", corpus, "--tokenizer", ab, "--output", ab.with_suffix("")]
    assert f"{ab}: is there already" in command_refusal(corpus.parent, capsys, *words)


@pytest.fixture
def ab(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "ab.json"))
    return tmp_path / "ab.json"


def test_prepare_and_a_set_of_megatron(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not over one without a manifest, and not over one that `adopt` has given a manifest."""
    prefix = corpus.with_name("set")
    assert main(["prepare", str(corpus), *BYTES, "--output", str(prefix)]) == 0
    prefix.with_suffix(".json").unlink()
    words = ["prepare", corpus, *BYTES, "--output", prefix]
    assert "set.bin: is there already" in command_refusal(corpus.parent, capsys, *words)
    assert main(["adopt", str(prefix), "--tokenizer", "bytes"]) == 0
    capsys.readouterr()
    assert "set.json: is there already" in command_refusal(corpus.parent, capsys, *words)
    assert "set.json: is there already" in command_refusal(
        corpus.parent, capsys, "adopt", prefix, "--tokenizer", "bytes"
    )


def test_prepare_replaces_its_own_sets(corpus: Path) -> None:
    prefix = corpus.with_name("set")
    words = ["prepare", str(corpus), *BYTES, "--output", str(prefix)]
    assert main(words) == 0
    corpus.write_text("another text")
    assert main(words) == 0
    assert IndexedDataset(prefix).num_tokens == len("another text") + 1
    damaged = prefix.with_suffix(".json")
    damaged.write_bytes(damaged.read_bytes()[:-9])  # then the message is to prepare it again
    prefix.with_suffix(".bin").write_bytes(b"")
    assert main(words) == 0
    IndexedDataset(prefix).verify()


@pytest.mark.parametrize("name", ["", "folder/"])
def test_a_prefix_without_a_name(corpus: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    output = f"{corpus.parent}/{name}" if name else ""
    assert "names no file" in command_refusal(corpus.parent, capsys, "prepare", corpus, *BYTES, "--output", output)


def test_a_stale_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", *sotu_files()[:3], "--separator", "\\n", *BYTES, "--output", tmp_path / "set", "--split"]
    assert main([str(word) for word in [*words, 0.5, 0.25, 0.25]]) == 0
    capsys.readouterr()
    error = command_refusal(tmp_path, capsys, *words, 0.75, 0.25, 0)
    assert "set-test: is there from an earlier --split" in error
    assert "remove set-test.bin, .idx and .json" in error
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"set-test{suffix}").unlink()
    assert main([str(word) for word in [*words, 0.75, 0.25, 0]]) == 0
    assert not list(tmp_path.glob("set-test*"))
    words.remove("--split")
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert all(f"{tmp_path}/set-{name}: an earlier set is still there" in out for name in ("train", "validation"))
    assert main([str(word) for word in [*words, "--split", 0.75, 0.25, 0]]) == 0
    assert f"{tmp_path}/set: an earlier set is still there" in capsys.readouterr().out


def test_train_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "corpus.txt"
    shutil.copy(sotu_files()[0], source)
    words = ["train-tokenizer", source, "--vocab-size", 400, "--output"]
    assert "is an input" in command_refusal(tmp_path, capsys, *words, source)
    (tmp_path / "notes").write_text("a user's own")
    assert "is not a sentencepiece model" in command_refusal(tmp_path, capsys, *words, tmp_path / "notes")
    (tmp_path / "folder").mkdir()
    assert "is not a sentencepiece model" in command_refusal(tmp_path, capsys, *words, tmp_path / "folder")
    model = tmp_path / "t.model"
    assert main([str(word) for word in [*words, model]]) == 0
    before = model.read_bytes()
    assert main([str(word) for word in [*words, model]]) == 0  # that very model
    assert model.read_bytes() == before
    words[3] = 410
    capsys.readouterr()
    assert "another tokenizer is there already" in command_refusal(tmp_path, capsys, *words, model)


def test_prepare_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from overtok_megatron.evaluation import task_files

    line = json.dumps({"doc_id": 0, "doc": {"query": "q", "choices": ["a"]}, "request": {"context": "q"}})
    monkeypatch.setattr(task_files, "_read", lambda source, folder: line.encode())
    out = tmp_path / "out"
    words = ["prepare-tasks", "--output", out]
    assert main([str(word) for word in words]) == 0
    assert main([str(word) for word in words]) == 0
    moved = out.rename(tmp_path / "moved")  # its definitions name the old place
    assert main(["prepare-tasks", "--output", str(moved)]) == 0
    assert str(moved) in (moved / "piqa.yaml").read_text()
    words[-1] = moved
    for name in ("piqa.jsonl", "lambada.yaml"):
        kept = (moved / name).read_bytes()
        (moved / name).write_bytes(kept + b"a user's own")
        capsys.readouterr()
        assert f"{moved / name}: is there already" in command_refusal(tmp_path, capsys, *words)
        (moved / name).write_bytes(kept)
