"""What is seen of a corpus and what becomes of it: names, links, marks, separators, and the account of all of it."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from overtok_megatron.cli import main
from overtok_megatron.data.preparing import encoding
from overtok_megatron.data.preparing.inputs import expand, find_inputs
from overtok_megatron.data.preparing.prepare import Plan, prepare_sets
from overtok_megatron.data.preparing.sources import ReadOptions
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.data.tokenizers.hugging_face import HuggingFaceTokenizer
from overtok_megatron.data.tokenizers.loading import infer_kind
from overtok_megatron.errors import DataError


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """What `overtok prepare` prints; for code 2 its one line of an error."""
    assert main(["prepare", *map(str, words)]) == code
    out, err = capsys.readouterr()
    if code:
        assert err.count("\n") == 1
    return err if code else out


def texts(prefix: Path) -> list[bytes]:
    tokens = np.fromfile(prefix.with_suffix(".bin"), dtype=np.uint16)
    ends = np.flatnonzero(tokens == 256)
    return [part[:-1].astype(np.uint8).tobytes() for part in np.split(tokens, ends + 1)[:-1]]


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    return [tmp_path / "in", "--tokenizer", "bytes", "--workers", "1", "--output", tmp_path / "set"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_the_last_line_adds_up(folder: Path, words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "UP.JSONL").write_text('{"text": "up"}\n{"text": ""}\n')
    (folder / "notes.md").write_text("no corpus")
    (folder / "empty.txt").touch()
    for name in (".ipynb_checkpoints", ".git"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text("hidden")
    (folder / "._a.txt").write_text("hidden")
    outside = folder.with_name("outside")
    outside.mkdir()
    (outside / "b.txt").write_text("behind a link")
    (folder / "link").symlink_to(outside)
    out = run(capsys, *words).splitlines()
    assert texts(folder.with_name("set")) == [b"up", b"behind a link"]
    assert out[-1] == (
        "7 files seen: 2 read, 5 left out (3 hidden, 1 without a known suffix, 1 without text); "
        "3 documents seen: 2 written, 1 left out (1 empty)"
    )
    assert f"documents left out, empty: {folder}/UP.JSONL: line 2" in out
    assert f"files left out, without a known suffix: {folder}/notes.md" in out
    assert any(f"{folder}/.git/ (1 files)" in line for line in out)


def test_many_of_a_reason_are_counted_and_ten_named(
    folder: Path, words: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(23):
        (folder / f"{number:02d}.md").touch()
    (folder / "a.txt").write_text("a")
    out = run(capsys, *words)
    assert "09.md, and others, 23 in all" in out
    assert "10.md" not in out
    assert "24 files seen: 1 read, 23 left out (23 without a known suffix)" in out


def test_its_own_output_is_no_input(folder: Path, words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.txt").write_text("a")
    words[-1] = folder / "set"
    run(capsys, *words)
    words[-1] = folder / "second"
    assert "3 of a prepared set" in run(capsys, *words)  # of another one
    assert texts(folder / "second") == [b"a"]
    words[-1] = folder / "set"
    assert "6 of a prepared set" in run(capsys, *words)
    words[0] = f"{folder}/*.*"
    words += ["--format", "text"]
    assert "6 of a prepared set" in run(capsys, *words)
    assert texts(folder / "set") == [b"a"]


def test_the_tokenizer_is_no_input(folder: Path, words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "t.jsonl").write_text('{"text": "ab"}\n{"text": "xyz"}\n')
    words[2] = folder / "tokenizer.json"
    out = run(capsys, *words)
    assert "1 used as the tokenizer" in out
    assert f"documents left out, of which the tokenizer keeps nothing: {folder}/t.jsonl: line 2" in out
    assert "2 documents seen: 1 written, 1 left out" in out


def test_a_corpus_of_which_a_tokenizer_keeps_nothing(
    folder: Path, words: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    test_the_tokenizer_is_no_input(folder, words, capsys)
    (folder / "t.jsonl").write_text('{"text": "xyz"}\n')
    error = run(capsys, *words, code=2)
    assert "hold no text that the tokenizer keeps (1 left out (1 of which the tokenizer keeps nothing)" in error


def test_the_account_outlives_a_kill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was counted before it is counted once, for any moment."""
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 1)
    for number in range(4):
        (folder / f"{number}a.txt").write_text("" if number % 2 else "no separator")
        (folder / f"{number}b.jsonl").write_text('{"text": ""}\n{"text": "x"}\n')
    plan = Plan(ReadOptions(separator="|"), journal_seconds=0)
    whole = prepare_sets(expand([folder]), folder.parent / "whole", ByteTokenizer(), plan).account
    assert (whole.num_read, whole.files.total, whole.num_written, whole.documents.total) == (6, 2, 6, 4)
    assert whole.unsplit.total == 2
    calls = 0

    def count(last: int = 1000) -> None:
        nonlocal calls
        calls += 1
        if calls > last:
            raise KeyboardInterrupt

    prepare_sets(expand([folder]), folder.parent / "count", ByteTokenizer(), plan, lambda size: count())
    most = calls
    assert most > 4
    for last in range(1, most):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            prepare_sets(expand([folder]), folder.parent / "set", ByteTokenizer(), plan, lambda size: count(last))  # noqa: B023
        assert prepare_sets(expand([folder]), folder.parent / "set", ByteTokenizer(), plan).account == whole


def test_files_are_read_once_under_their_own_name(folder: Path, tmp_path: Path) -> None:
    (folder / "b.txt").write_text("b")
    (folder / "a.txt").symlink_to("b.txt")
    (folder / "loop").symlink_to(".")
    (folder / "up").symlink_to(tmp_path)
    (folder / "broken.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    found = find_inputs([folder, folder / "a.txt", f"{folder}/b*.txt"])
    assert found.files == [folder / "b.txt"]
    assert {reason: count for reason, (count, _) in found.left_out.tallies.items()} == {
        "behind a broken link": 2,
        "not regular": 1,
        "linked to a folder above": 2,
        "read already under another name": 3,
    }


def test_folders_that_a_pattern_matches_are_named(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    found = find_inputs([f"{folder}/*"])
    assert found.files == [folder / "b.txt"]
    assert found.left_out.tallies == {"matched as a folder": (1, [f"{folder}/deep/"])}
    found = find_inputs([f"{folder}/**"])
    assert (found.files, found.left_out.total) == ([folder / "b.txt", folder / "deep/a.txt"], 0)


@pytest.mark.parametrize("name", ["dump", "dump.md", "dump.gz"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "raw JSON"}\n', "give --format jsonl"),
        (b'\xef\xbb\xbf\n [{"text": 1}]', "give --format jsonl"),
        (b"PAR1rest", "--format parquet"),
    ],
)
def test_what_has_no_suffix_and_is_no_text(folder: Path, name: str, content: bytes, said: str) -> None:
    import gzip

    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=f"{name}: has no known suffix, and looks like .*{said}"):
        find_inputs([path])
    assert find_inputs([path], ReadOptions(format="text")).files == [path]
    path.write_bytes(gzip.compress(b"[sic] text") if name.endswith(".gz") else b"[sic] text")
    assert find_inputs([path]).files == [path]


def test_a_tar_archive_is_no_text(folder: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    (folder / "a.tar.gz").write_bytes(content.getvalue())
    with pytest.raises(DataError, match="is a tar archive; unpack it"):
        find_inputs([folder / "a.tar.gz"])


@pytest.mark.parametrize(
    ("name", "said"), [("link", "a link to nowhere, which is not there"), ("pipe", "neither a file nor")]
)
def test_named_inputs_that_are_no_files(folder: Path, name: str, said: str) -> None:
    (folder / "link").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    with pytest.raises(DataError, match=said):
        find_inputs([folder / name])


@pytest.mark.parametrize(
    ("given", "content", "wanted"),
    [
        (r"\r\n\r\n", b"a\r\n\r\nb", [b"a", b"b"]),
        (r"\x1e", b"a\x1eb", [b"a", b"b"]),
        (r"\u2029", "a\u2029b".encode(), [b"a", b"b"]),
        (r"\\n", rb"a\nb", [b"a", b"b"]),
        (r"\section", rb"a\sectionb", [b"a", b"b"]),
        (r"\t", b"a\tb", [b"a", b"b"]),
    ],
)
def test_separators(
    folder: Path,
    words: list[object],
    capsys: pytest.CaptureFixture[str],
    given: str,
    content: bytes,
    wanted: list[bytes],
) -> None:
    (folder / "a.txt").write_bytes(content)
    assert "does not occur" not in run(capsys, *words, "--separator", given)
    assert texts(folder.with_name("set")) == wanted


def test_a_separator_that_never_occurs_is_said(
    folder: Path, words: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "crlf.txt").write_bytes(b"a\r\n\r\nb")
    (folder / "lf.txt").write_bytes(b"a\n\nb")
    out = run(capsys, *words, "--separator", r"\n\n")
    expected = (
        f"does not occur in 1 of 2 text files, which are one document each (lines end in \\r\\n): {folder}/crlf.txt"
    )
    assert expected in out
    assert f"does not occur in 2 of 2 text files, which are one document each: {folder}/crlf.txt" in run(
        capsys, *words, "--separator", "||"
    )


def test_a_separator_that_is_no_text(folder: Path, words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.txt").write_text("a")
    with pytest.raises(SystemExit) as caught:
        main(["prepare", *map(str, words), "--separator", "\udcff"])
    assert caught.value.code == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_marks_are_no_text(folder: Path, words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    (folder / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "b"}\n\xef\xbb\xbf{"text": "\xef\xbb\xbfc"}\n')
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbf")
    assert "1 without text" in run(capsys, *words)
    assert texts(folder.with_name("set")) == [b"a", b"b", b"\xef\xbb\xbfc"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named(
    folder: Path, words: list[object], capsys: pytest.CaptureFixture[str], name: str, code: str
) -> None:
    (folder / name).write_bytes('{"text": "a text"}\n'.encode(code))
    error = run(capsys, *words, code=2)
    assert f"{folder / name}: " in error
    assert f"{code[:6].upper()}" in error
    assert "iconv -f UTF" in error


def test_a_tokenizer_with_a_mark(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    made.add_special_tokens(["<|endoftext|>"])
    path = tmp_path / "tokenizer.json"
    text = made.to_str()
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert infer_kind(path) == "hugging_face"
    tokenizer = HuggingFaceTokenizer(path)
    assert tokenizer.encode("ab") == [0, 1]
    assert not tokenizer.undecided(0)
    path.write_bytes(text.encode("utf-16"))
    assert infer_kind(path) == "hugging_face"
    with pytest.raises(DataError, match=r"not a Hugging Face tokenizer.json \(UTF-16 by its byte-order mark"):
        HuggingFaceTokenizer(path)


@pytest.mark.parametrize("name", ["tokenizers", "profile", "numpy", "overtok_megatron"])
def test_workers_import_nothing_of_the_current_folder(
    folder: Path, words: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (folder / "a.txt").write_text("a")
    (folder / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(folder)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(["", os.environ.get("PYTHONPATH", "")])
    )  # an empty entry is that folder
    words[4] = "2"
    run(capsys, *words)
    assert texts(folder.with_name("set")) == [b"a"]
