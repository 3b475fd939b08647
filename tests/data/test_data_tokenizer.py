"""Tokenizer: what comes back, what training looks at, and what a wrong file or corpus says."""

import resource
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from overtok_megatron.data.preparing.train_tokenizer import train_sentencepiece
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.errors import DataError

CORPUS = "A small corpus of words, with numbers 1234 and lines.\n\n" * 20 + "Voilà, naïve façades.\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    train_sentencepiece([folder / "corpus.txt"], 320, folder / "t.model")
    return load_tokenizer("sentencepiece", folder / "t.model")


def one_line(caught: pytest.ExceptionInfo[DataError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# the alphabet is weighted towards what breaks tokenizers: the space mark, NUL, line ends, markup, a byte order mark
HARD = st.text(
    st.sampled_from(list("\u2581\0 \n\r\t\ufeff\u2028</s>ab0é😀")) | st.characters(exclude_categories=["Cs"])
)


@settings(max_examples=200, deadline=None)
@given(text=HARD)
@example(text="\u2581")
@example(text="a\u2581\u2581 b\u2581")
@example(text="<0x41><unk></s>")
@example(text="\0a\0")
def test_every_utf8_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eod_id not in tokens
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.encode_batch([text, "words", text]) == [tokens, tokenizer.encode("words"), tokens]


def test_a_corpus_on_one_endless_line_trains(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text(CORPUS.replace("\n", " ") * 100, encoding="utf-8")
    assert (tmp_path / "line.txt").stat().st_size > 1 << 16  # sentencepiece alone would drop the line
    train_sentencepiece([tmp_path / "line.txt"], 310, tmp_path / "t.model")
    assert load_tokenizer("sentencepiece", tmp_path / "t.model").vocab_size == 310


def test_training_samples_the_whole_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overtok_megatron.data.preparing.train_tokenizer._SENTENCES", 500)
    (tmp_path / "a.txt").write_text("plain plain plain\n" * 1000, encoding="utf-8")
    (tmp_path / "b.txt").write_text("zebra zebra zebra\n" * 1000, encoding="utf-8")
    for name in ("one", "two"):
        train_sentencepiece([tmp_path / "a.txt", tmp_path / "b.txt"], 280, tmp_path / name)
    tokenizer = load_tokenizer("sentencepiece", tmp_path / "one")
    assert len(tokenizer.encode("plain")) == len(tokenizer.encode("zebra")) == 1
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_corpus_too_small_names_a_size_that_works(tmp_path: Path) -> None:
    corpus = tmp_path / "small.txt"
    corpus.write_text("abc abc\nabd\n", encoding="utf-8")
    with pytest.raises(DataError, match="too small for a vocabulary of 8192") as caught:
        train_sentencepiece([corpus], 8192, tmp_path / "t.model")
    largest = int(one_line(caught).split()[-1])
    assert not (tmp_path / "t.model").exists()
    train_sentencepiece([corpus], largest, tmp_path / "t.model")
    assert load_tokenizer("sentencepiece", tmp_path / "t.model").vocab_size == largest


def test_a_vocabulary_too_small_for_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(CORPUS, encoding="utf-8")
    with pytest.raises(DataError, match="100 does not hold the 256 bytes") as caught:
        train_sentencepiece([tmp_path / "c.txt"], 100, tmp_path / "t.model")
    one_line(caught)


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_an_empty_corpus(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(DataError, match="empty"):
        train_sentencepiece([tmp_path / "empty.txt"], 300, tmp_path / "t.model")


@pytest.mark.parametrize("content", [None, b"", b"plain text\n" * 20, bytes(range(256))])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer("sentencepiece", path)
    assert str(path) in one_line(caught)


@pytest.mark.parametrize("options", [{"eos_id": -1}, {"eos_id": -1, "user_defined_symbols": ["</s>"]}])
def test_a_model_without_an_end_of_document(tmp_path: Path, options: dict[str, object]) -> None:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    with pytest.raises(DataError, match="end-of-sentence control piece"):
        load_tokenizer("sentencepiece", tmp_path / "m.model")


def test_a_model_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(CORPUS, encoding="utf-8")
    with pytest.raises(DataError, match="cannot be written"):
        train_sentencepiece([tmp_path / "c.txt"], 300, tmp_path / "c.txt" / "t.model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # stands for a full disk
        with pytest.raises(DataError, match="cannot be written") as caught:
            train_sentencepiece([tmp_path / "c.txt"], 300, tmp_path / "t.model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_line(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]
