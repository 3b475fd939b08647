"""Hugging Face and byte tokenizers: the ids of their library, and an end of document that no text can spell."""

import pickle
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel

from overtok_megatron.cli import main
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.data.tokenizers.hugging_face import HuggingFaceTokenizer
from overtok_megatron.data.tokenizers.loading import infer_kind, load_tokenizer
from overtok_megatron.errors import DataError

EOD = "<|endoftext|>"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tokenizers.Tokenizer]:
    """A byte-level BPE as the paper's are: a special end of text, a plain placeholder, and settings that must not matter."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|padding|>"]
    )
    tokenizer.train_from_iterator([path.read_text(encoding="utf-8") for path in sotu_files()[:3]], trainer)
    tokenizer.add_special_tokens([EOD])
    tokenizer.add_tokens(["|||EMAIL|||"])
    begin = tokenizer.token_to_id(EOD)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOD} $A", special_tokens=[(EOD, begin)])
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=50)
    path = tmp_path_factory.mktemp("library") / "tokenizer.json"
    tokenizer.save(str(path))
    return path, tokenizer


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from([EOD, "<|padding|>", "|||EMAIL|||", "naïve ", "two words", "\n", "\0"])).map("".join)
)
def test_any_text_comes_back_and_none_ends_a_document(library: tuple[Path, tokenizers.Tokenizer], text: str) -> None:
    ours = HuggingFaceTokenizer(library[0])
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert ours.eod_id not in ids
    assert ours.encode_batch([text, "words"]) == [ids, ours.encode("words")]


def test_a_worker_reads_a_text_as_its_parent_does(library: tuple[Path, tokenizers.Tokenizer]) -> None:
    ours = HuggingFaceTokenizer(library[0])
    sent = pickle.loads(pickle.dumps(ours))
    text = f"words{EOD} more <|padding|>|||EMAIL|||"
    assert sent.encode(text) == ours.encode(text)
    assert sent.encode_batch([text]) == [ours.encode(text)]
    assert ours.eod_id not in sent.encode(text)


def test_ids_are_the_librarys(library: tuple[Path, tokenizers.Tokenizer]) -> None:
    path, theirs = library
    theirs.no_truncation()
    theirs.no_padding()
    text = sotu_files()[100].read_text(encoding="utf-8") + "|||EMAIL|||"
    ours = load_tokenizer("hugging_face", path.parent)  # the folder will do
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.vocab_size == theirs.get_vocab_size(with_added_tokens=True) == 402
    assert (ours.eod_id, ours.encode("|||EMAIL|||")) == (400, [401])


def test_the_end_of_document_is_chosen_and_checked(library: tuple[Path, tokenizers.Tokenizer]) -> None:
    assert HuggingFaceTokenizer(library[0], "<|padding|>").eod_id == 0
    with pytest.raises(DataError, match=r"has no token '</s>'.*<\|padding\|>, <\|endoftext\|>"):
        HuggingFaceTokenizer(library[0], "</s>")
    with pytest.raises(DataError, match="a text can spell its token"):
        HuggingFaceTokenizer(library[0], "|||EMAIL|||")


@pytest.mark.parametrize("content", [None, b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer("hugging_face", path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_come_back(text: str) -> None:
    ours = load_tokenizer("bytes", None)
    assert ours.encode(text) == list(text.encode())
    assert ours.encode_batch([text]) == [ours.encode(text)]
    assert ours.decode([*ours.encode(text), ours.eod_id]) == text


def test_bytes_that_are_no_text_still_decode() -> None:
    assert ByteTokenizer().decode([104, 0xFF, 105]) == "h\ufffdi"


def test_prepare_infers_the_kind(
    library: tuple[Path, tokenizers.Tokenizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("two words", encoding="utf-8")
    corpus = str(tmp_path / "a.txt")
    command = ("prepare", corpus, "--workers", "2", "--tokenizer")
    assert infer_kind(library[0]) == infer_kind(library[0].parent) == "hugging_face"
    assert main((*command, str(library[0]), "--output", str(tmp_path / "json"))) == 0
    assert main((*command, "bytes", "--output", str(tmp_path / "bytes"))) == 0
    ours = HuggingFaceTokenizer(library[0])
    dataset = IndexedDataset(tmp_path / "json")
    assert dataset.tokens(0, dataset.num_tokens).tolist() == [*ours.encode("two words"), ours.eod_id]
    assert dataset.manifest.tokenizer_fingerprint == ours.fingerprint()
    assert IndexedDataset(tmp_path / "bytes").num_tokens == 10
    capsys.readouterr()
    for wrong, said in (
        (("bytes", "--eod-token", "x"), "bytes has neither a file"),
        (("bytes", "--tokenizer-type", "sentencepiece"), "bytes is no file"),
        ((corpus, "--tokenizer-type", "bytes"), "bytes has neither a file"),
        (("bytes", "--split", "0.9", "0.2", "0.1"), "--split: 0.9 0.2 0.1"),
        ((corpus,), "not a sentencepiece model"),
    ):
        assert main((*command, *wrong, "--output", str(tmp_path / "no"))) == 2
        assert said in capsys.readouterr().err
