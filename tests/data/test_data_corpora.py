"""Corpora in every form give the same set; every kind of damage is one line that names the place, and leaves nothing."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from overtok_megatron.data.preparing import compression
from overtok_megatron.data.preparing.inputs import expand
from overtok_megatron.data.preparing.prepare import Plan, prepare_sets
from overtok_megatron.data.preparing.sources import Position, ReadOptions, documents, read_chunks, read_documents
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.errors import DataError

TEXTS = [f'document {number} — naïve\n"quoted" {"x" * (number % 7)}' for number in range(1000)]
MARK = "\n=====\n"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts))


def write_parquet(path: Path, texts: list[str | None], kind: pyarrow.DataType | None = None) -> None:
    column = pyarrow.array(texts, kind or pyarrow.string())
    table = pyarrow.table({"id": pyarrow.array(range(len(texts))), "text": column})
    pyarrow.parquet.write_table(table, path, row_group_size=300)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same documents in every form, and what they are as a set."""
    folder = tmp_path_factory.mktemp("corpora")
    files = {}
    for suffix, squeeze in COMPRESS.items():
        files[f"jsonl{suffix}"] = folder / f"set.jsonl{suffix}"
        files[f"jsonl{suffix}"].write_bytes(squeeze(jsonl(TEXTS)))
        files[f"txt{suffix}"] = folder / f"set.txt{suffix}"
        files[f"txt{suffix}"].write_bytes(squeeze(MARK.join(TEXTS).encode()))
    files["several frames.zst"] = folder / "frames.jsonl.zst"
    files["several frames.zst"].write_bytes(COMPRESS[".zst"](jsonl(TEXTS[:500])) + COMPRESS[".zst"](jsonl(TEXTS[500:])))
    for name, kind in (
        ("parquet", pyarrow.string()),
        ("large.parquet", pyarrow.large_string()),
        ("dictionary.parquet", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    ):
        files[name] = folder / f"set.{name}"
        write_parquet(files[name], TEXTS, kind)
    return files


FORMS = [
    *(f"{kind}{suffix}" for kind in ("jsonl", "txt") for suffix in COMPRESS),
    "several frames.zst", "parquet", "large.parquet", "dictionary.parquet",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(
    corpora: dict[str, Path], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "_BLOCK", 4096)
    reading = ReadOptions(separator=MARK)
    assert list(read_documents([corpora[form]], reading)) == TEXTS
    whole = list(read_chunks([corpora[form]], reading, chunk_bytes=4000))
    assert len(whole) >= 2  # zstd gives 128 KiB at once
    assert sum(chunk.disk_bytes for chunk in whole) == corpora[form].stat().st_size
    for place in (1, len(whole) // 2, len(whole) - 1):  # going on where a kill left off
        rest = read_chunks([corpora[form]], reading, whole[place].begin)
        texts = [text for chunk in whole[:place] for text, _ in documents(chunk, reading)]
        assert texts + [text for chunk in rest for text, _ in documents(chunk, reading)] == TEXTS


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.sampled_from("ab\né|"), max_size=60),
    separator=st.sampled_from(["\n", "\n\n", "||", "aba", "é"]),
    block=st.integers(1, 9),
    chunk=st.integers(1, 12),
)
def test_cuts_do_not_show(
    tmp_path_factory: pytest.TempPathFactory, text: str, separator: str, block: int, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(text.encode())
    reading = ReadOptions(separator=separator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "_BLOCK", block)
        chunks = list(read_chunks([path], reading, chunk_bytes=chunk))
    assert [part for one in chunks for part, _ in documents(one, reading)] == [*filter(None, text.split(separator))]
    assert chunks[-1].end == Position(1)


def test_folders_hold_all_forms_but_no_other_files(corpora: dict[str, Path]) -> None:
    folder = corpora["parquet"].parent
    (folder / "README.md").write_text("no corpus")
    assert expand([folder]) == sorted(corpora.values())


def prepared(path: Path, scratch: Path, workers: int = 1, key: str = "text") -> None:
    plan = Plan(ReadOptions(key=key, separator=MARK), workers=workers)
    prepare_sets([path], scratch / "out" / "set", ByteTokenizer(), plan)


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


BROKEN = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", BROKEN * 3 + b'{"text": "cut', "line 4 (byte 51): not JSON (Unterminated string"),
        ("a.jsonl", BROKEN + b"\n[1]\n", "line 3 (byte 18): a JSON list"),
        (
            "a.jsonl",
            BROKEN * 2 + b'{"body": "x", "id": 1}\n',
            "line 3 (byte 34): has no key 'text'; its keys are body, id",
        ),
        ("a.jsonl", BROKEN + b'{"text": null}', "line 2 (byte 17): 'text' is of type NoneType"),
        ("a.jsonl", BROKEN + b'{"text": "\xff"}', "line 2: not UTF-8 at byte 27"),
        ("a.jsonl", BROKEN + b'{"text": "\\ud800"}', "line 2 (byte 17): 'text' holds half a surrogate pair (U+D800)"),
        ("a.jsonl", b"[" * 100_000, "line 1 (byte 0): JSON nested too deeply"),
        ("a.txt", b"good" + MARK.encode() + b"bad \xe9", "not UTF-8 at byte 15"),
        ("a.parquet", b"no parquet at all", "damaged or cut short at row 0"),
        ("a.jsonl.gz", b"plain text", "damaged or cut short after byte 0"),
        ("a.jsonl.xz", b"plain text", "damaged or cut short after byte 0"),
        ("a.jsonl.zst", b"plain text", "damaged or cut short after byte 0"),
    ],
)
def test_bad_content_names_its_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    fails(path, tmp_path, said)


def test_a_worker_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BROKEN * 3 + b'{"text": "cut')
    fails(path, tmp_path, "line 4 (byte 51): not JSON (Unterminated string", workers=2)


def fails(path: Path, scratch: Path, said: str, workers: int = 1, key: str = "text") -> None:
    with pytest.raises(DataError) as caught:
        prepared(path, scratch, workers, key)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert said in text
    assert "\n" not in text
    assert list((scratch / "out").iterdir()) == []


@pytest.mark.parametrize("damage", [cut, flipped])
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_damaged_or_cut_archive(
    corpora: dict[str, Path], tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    content = corpora[f"jsonl{suffix}"].read_bytes()
    if suffix == ".zst":  # as the command zstd writes it
        content = zstandard.ZstdCompressor(write_checksum=True).compress(jsonl(TEXTS))
    path.write_bytes(damage(content))
    fails(path, tmp_path, "")  # its JSON may be found bad before its checksum is


@pytest.mark.parametrize("length", [1, 20, 600, 2000])
def test_an_archive_cut_anywhere_is_never_a_shorter_text(tmp_path: Path, length: int) -> None:
    for suffix, squeeze in COMPRESS.items():
        if suffix:
            path = tmp_path / f"a.txt{suffix}"
            path.write_bytes(squeeze(MARK.join(TEXTS).encode())[:-length])
            fails(path, tmp_path, "cut short after byte")


def test_parquet_that_does_not_fit(corpora: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(cut(corpora["parquet"].read_bytes()))
    fails(path, tmp_path, "damaged or cut short at row 0")
    fails(corpora["parquet"], tmp_path, "has no column 'body'; its columns are id, text", key="body")
    fails(corpora["parquet"], tmp_path, "column 'id' is of type int64, not text", key="id")
    write_parquet(path, [*TEXTS[:400], None])
    fails(path, tmp_path, "row 400: 'text' is of type NoneType")
    content = bytearray(corpora["parquet"].read_bytes())
    content[40:4000] = bytes(3960)
    path.write_bytes(content)
    fails(path, tmp_path, "damaged or cut short at row")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_an_absent_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    fails(tmp_path / name, tmp_path, f"pip install {package}")


def test_an_empty_input_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `overtok prepare "$TEXTS"` where the variable is not set."""
    (tmp_path / "other.txt").write_text("not asked for", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="an input is empty"):
        expand([""])
