"""Tokenizer, indexed format, order of samples, validation coverage, and what damaged files say."""

import builtins
import errno
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.data.batches import validation_batches
from overtok_megatron.data.indexed import IndexedDataset, IndexedWriter
from overtok_megatron.data.preparing.prepare import prepare
from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.sampler import SampleOrder
from overtok_megatron.data.sotu import hold_out_last, sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.errors import DataError
from support.dataset_factory import train_batches, write_dataset


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_sentencepiece(sotu_files()[:8], 600, path)
    return load_tokenizer("sentencepiece", path)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate is no text in UTF-8
        return
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eod_id not in tokens


def test_real_text_and_its_markup_survive(tokenizer: Tokenizer) -> None:
    text = sotu_files()[100].read_text(encoding="utf-8") + "</s><unk>  two  spaces\n\n\n\ttab"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eod_id not in tokenizer.encode("</s>")
    assert tokenizer.encode_batch([text, "a"]) == [tokenizer.encode(text), tokenizer.encode("a")]


def test_training_a_tokenizer_is_repeatable(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train_sentencepiece(sotu_files()[:8], 600, tmp_path / "again.model")
    assert load_tokenizer("sentencepiece", tmp_path / "again.model").fingerprint() == tokenizer.fingerprint()


def test_the_format_byte_by_byte(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", [[5, 6, 0], [7, 0]])
    assert (tmp_path / "set.bin").read_bytes() == np.array([5, 6, 0, 7, 0], dtype="<u2").tobytes()
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "set.idx").read_bytes() == expected
    large = write_dataset(tmp_path / "large", [[100_000, 0]], vocab_size=100_278)
    assert (tmp_path / "large.bin").read_bytes() == np.array([100_000, 0], dtype="<i4").tobytes()
    assert large.tokens(0, 2).tolist() == [100_000, 0]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with IndexedWriter(tmp_path / "set", 1000, 0, "f") as writer:
            writer.add([1, 2, 0], 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["bin", "idx", "json"])
@pytest.mark.parametrize("damage", ["missing", "short", "long", "foreign"])
def test_damage_is_named(tmp_path: Path, part: str, damage: str) -> None:
    write_dataset(tmp_path / "set", [[5, 6, 0], [7, 0]])
    path = tmp_path / f"set.{part}"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"short": content[:-1], "long": content + b"\0", "foreign": b"x" * 5}[damage])
    with pytest.raises(DataError) as caught:
        IndexedDataset(tmp_path / "set")
    assert str(path) in str(caught.value)
    assert "overtok prepare" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["bin", "idx", "json"])
def test_what_may_not_be_read_is_named(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "set", [[5, 6, 0], [7, 0]])
    path = tmp_path / f"set.{part}"

    def guarded(*given: object, **more: object) -> object:  # a superuser reads everything
        if any(str(one) == str(path) for one in given):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(*given, **more)  # type: ignore[call-overload]

    opened = io.open
    for module, name in ((io, "open"), (builtins, "open")):
        monkeypatch.setattr(module, name, guarded)
    with pytest.raises(DataError, match=rf"^{path}: cannot be read \(Permission denied\); ask its owner for access$"):
        IndexedDataset(tmp_path / "set")


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "set", [[5, 6, 0], [7, 0]])
    dataset.verify()
    path = tmp_path / "set.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"set\.bin: SHA-256 differs"):
        dataset.verify()


def test_prepare_counts_and_ends_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = sotu_files()[:3]
    told: list[int] = []
    manifest = prepare(files, tmp_path / "set", tokenizer, told.append)
    dataset = IndexedDataset(tmp_path / "set")
    tokens = dataset.tokens(0, dataset.num_tokens)
    ends = np.flatnonzero(tokens == tokenizer.eod_id)
    assert len(ends) == 3
    assert ends[-1] == len(tokens) - 1
    assert tokenizer.decode(tokens[: ends[0]].tolist()) == files[0].read_text(encoding="utf-8")
    assert sum(told) == manifest.source_bytes == sum(path.stat().st_size for path in files)
    assert json.loads((tmp_path / "set.json").read_text())["num_tokens"] == len(tokens)


def test_every_epoch_has_every_sample_once() -> None:
    order = SampleOrder(num_tokens=101, seq_length=10, seed=3, name="set")
    epochs = [[order.offset(epoch * 10 + i) for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(0, 100, 10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = SampleOrder(101, 10, 3, "set")
    assert [again.offset(25), again.offset(3)] == [epochs[2][5], epochs[0][3]]
    with pytest.raises(DataError, match="too few"):
        SampleOrder(10, 10, 3, "set")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_step_is_the_same_set_for_every_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    dataset = write_dataset(tmp_path / "set", [[*range(1, 500), 0]])
    accumulation, micro = 6 // ranks, 2
    whole = train_batches(dataset, 7, 12, seed=5)
    parts = [train_batches(dataset, 7, micro, accumulation, rank, ranks, seed=5) for rank in range(ranks)]
    for step in (0, 1, 9):
        together = np.concatenate([part.read(12 * step) for part in parts], axis=1)  # [A, ranks b, s + 1]
        assert (together.reshape(12, 8) == whole.read(12 * step)[0]).all()


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(2, 90), length=st.integers(1, 12), batch=st.integers(1, 4), ranks=st.integers(1, 3))
def test_validation_scores_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int, batch: int, ranks: int
) -> None:
    dataset = write_dataset(tmp_path_factory.mktemp("v") / "set", [list(range(1, tokens + 1))])
    batches = [list(validation_batches(dataset, length, batch, rank, ranks)) for rank in range(ranks)]
    assert len({len(rank) for rank in batches}) == 1
    scored = []
    for inputs, targets in (pair for rank in batches for pair in rank):
        assert (targets[targets != IGNORE_INDEX] == inputs[targets != IGNORE_INDEX] + 1).all()
        scored += targets[targets != IGNORE_INDEX].tolist()
    assert sorted(scored) == list(range(2, tokens + 1))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(2, 90),
    length=st.integers(1, 12),
    ranks=st.integers(1, 3),
    batch=st.integers(1, 4),
    most=st.integers(1, 20),
)
def test_a_bounded_validation_scores_the_first_windows_whatever_the_ranks(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int, ranks: int, batch: int, most: int
) -> None:
    dataset = write_dataset(tmp_path_factory.mktemp("v") / "set", [list(range(1, tokens + 1))])
    scored: list[int] = []
    for rank in range(ranks):
        for inputs, targets in validation_batches(dataset, length, batch, rank, ranks, most_windows=most):
            assert inputs.shape[0] <= -(-most // ranks)
            scored += targets[targets != IGNORE_INDEX].tolist()
    assert sorted(scored) == list(range(2, min(tokens, most * length + 1) + 1))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(2, 90),
    length=st.sampled_from([4, 8, 12]),
    batch=st.integers(1, 9),
    ranks=st.integers(1, 3),
    multiple=st.sampled_from([1, 2, 4]),
)
def test_validation_has_no_empty_windows(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int, batch: int, ranks: int, multiple: int
) -> None:
    """Only ranks without a window in the last round, which all must run, get an empty one; short sets are not padded."""
    dataset = write_dataset(tmp_path_factory.mktemp("v") / "set", [list(range(1, tokens + 1))])
    batches = [
        list(validation_batches(dataset, length, batch, rank, ranks, multiple=multiple, read=rank != 1))
        for rank in range(ranks)
    ]
    shapes = [[(inputs.shape, targets.shape) for inputs, targets in rank] for rank in batches]
    assert all(own == shapes[0] for own in shapes)
    windows = -(-(tokens - 1) // length)
    rows = [inputs.shape[0] for inputs, _ in batches[0]]
    assert max(rows) <= batch and windows <= sum(rows) * ranks < windows + ranks
    for inputs, targets in batches[0]:
        assert inputs.shape[1] % multiple == 0
        assert (targets != IGNORE_INDEX).any(axis=1).all()
    if tokens - 1 < length:
        assert batches[0][0][0].shape == (1, min(length, -(-(tokens - 1) // multiple) * multiple))


def test_the_last_speeches_are_held_out() -> None:
    training, held_out = hold_out_last(sotu_files(), 0.03)
    assert len(training) + len(held_out) == len(sotu_files())
    assert max(path.name[:4] for path in training) <= min(path.name[:4] for path in held_out)
    sizes = [sum(path.stat().st_size for path in part) for part in (training, held_out)]
    assert 0.03 <= sizes[1] / sum(sizes) < 0.06
