"""The indexed format: any documents survive it, broken writes stay invisible, contradictions are named, Megatron reads it."""

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.errors import DataError
from support.dataset_factory import write_dataset


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65_499), min_size=1, max_size=9), max_size=8),
    vocab_size=st.sampled_from([65_499, 65_500]),
)
def test_any_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int
) -> None:
    documents = [[token % vocab_size for token in document] for document in documents]
    prefix = tmp_path_factory.mktemp("set") / "set"
    dataset = write_dataset(prefix, documents, vocab_size)
    stream = [token for document in documents for token in document]
    assert dataset.num_tokens == len(stream)
    assert dataset.document_lengths.tolist() == [len(document) for document in documents]
    for start in range(len(stream) + 1):
        tokens = dataset.tokens(start, len(stream) - start)
        assert tokens.dtype == np.int64
        assert tokens.tolist() == stream[start:]
    assert Path(f"{prefix}.bin").stat().st_size == len(stream) * (2 if vocab_size < 65_500 else 4)
    dataset.verify()


def test_megatron_reads_it(tmp_path: Path) -> None:
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [[5, 6, 0], [7, 0], [999, 1, 2, 0]]
    for vocab_size in (1000, 100_278):
        write_dataset(tmp_path / f"set{vocab_size}", documents, vocab_size)
        theirs = module.IndexedDataset(str(tmp_path / f"set{vocab_size}"))
        assert [theirs[index].tolist() for index in range(len(theirs))] == documents
        assert theirs.document_indices.tolist() == [0, 1, 2, 3]


def test_what_megatron_builds_is_byte_for_byte_the_same(tmp_path: Path) -> None:
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    documents = [[5, 6, 0], [7, 0], [999, 1, 2, 0]]
    write_dataset(tmp_path / "ours", documents)
    builder = module.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for part in ("bin", "idx"):
        assert (tmp_path / f"ours.{part}").read_bytes() == (tmp_path / f"theirs.{part}").read_bytes()


@pytest.mark.parametrize("broken_rename", [0, 1, 2])
def test_an_interrupted_rename_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_rename: int
) -> None:
    replace, count = os.replace, 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count > broken_rename:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "set", [[1, 0]])
    assert list(tmp_path.iterdir()) == []


def test_a_broken_write_keeps_the_old_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [[1, 0]])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # stands for a full disk
        with pytest.raises(OSError, match="too large"):
            write_dataset(tmp_path / "set", [list(range(900))] * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert IndexedDataset(tmp_path / "set").tokens(0, 2).tolist() == [1, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.idx", "set.json"]


def manifest_with(**changes: object) -> Callable[[Path], Path]:
    def damage(prefix: Path) -> Path:
        path = Path(f"{prefix}.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path

    return damage


def index_with(offset: int, form: str, value: int) -> Callable[[Path], Path]:
    def damage(prefix: Path) -> Path:
        path = Path(f"{prefix}.idx")
        content = bytearray(path.read_bytes())
        struct.pack_into(form, content, offset, value)
        path.write_bytes(bytes(content))
        return path

    return damage


def one_document(prefix: Path) -> Path:
    path = Path(f"{prefix}.idx")
    content = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 2)
    path.write_bytes(content + struct.pack("<2i2q2q", 3, 2, 0, 6, 0, 2))
    return Path(f"{prefix}.json")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (manifest_with(num_tokens=4), "counts 4 tokens, the index 5"),
        (manifest_with(num_documents=3), "counts 3 documents, the index 2"),
        (manifest_with(vocab_size="1000"), "vocab_size is '1000'"),
        (manifest_with(eod_id=None), "eod_id is None"),
        (manifest_with(surplus=1), "not a dataset's manifest"),
        (index_with(9, "<Q", 2), "version 2"),
        (index_with(17, "<B", 6), "dtype code 6"),
        (index_with(18, "<Q", 2**60), "its header speaks of"),
        (one_document, "counts 2 documents, the index 1"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, damage: Callable[[Path], Path], said: str) -> None:
    write_dataset(tmp_path / "set", [[5, 6, 0], [7, 0]])
    path = damage(tmp_path / "set")
    with pytest.raises(DataError) as caught:
        IndexedDataset(tmp_path / "set")
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert said in text
    assert "overtok prepare" in text
    assert "\n" not in text


def test_a_truncated_file_tells_both_sizes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [[5, 6, 0], [7, 0]])
    (tmp_path / "set.bin").write_bytes(b"\0" * 7)
    with pytest.raises(DataError, match=r"set\.bin: 7 bytes, its index speaks of 10; prepare it again"):
        IndexedDataset(tmp_path / "set")


def test_a_changed_index_fails_verification(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", [[5, 6, 0], [7, 0]])
    index_with(42, "<q", 2)(tmp_path / "set")  # an offset, which the reader itself does not need
    with pytest.raises(DataError, match=r"set\.idx: SHA-256 differs"):
        dataset.verify()


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    """Through a memory map the process would end here by SIGBUS, without a word."""
    dataset = write_dataset(tmp_path / "set", [[7] * 40_000, [8] * 40_000])
    assert dataset.tokens(79_998, 2).tolist() == [8, 8]
    os.truncate(tmp_path / "set.bin", 50_000)
    assert dataset.tokens(24_000, 1000).tolist() == [7] * 1000
    for start, count in ((24_999, 2), (70_000, 1)):
        with pytest.raises(
            DataError, match=r"set\.bin: ends at byte \d+ or before, its index speaks of 160000: .* start again$"
        ):
            dataset.tokens(start, count)
    folder = os.open(tmp_path, os.O_RDONLY)  # its reads fail, as those of a broken disk do
    os.dup2(folder, dataset._file.fileno())
    os.close(folder)
    with pytest.raises(DataError, match=r"set\.bin: cannot be read at byte 0 \(.*\); check its disk"):
        dataset.tokens(0, 1)
