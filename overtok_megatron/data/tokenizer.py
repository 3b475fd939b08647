"""Tokenizers behind one small protocol; training one with sentencepiece. Token 0 ends a document and no text yields it."""

import hashlib
import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece

from overtok_megatron.errors import DataError

_MAX_SENTENCE_BYTES = 1 << 16
_SENTENCES = 100_000  # sampled for training a tokenizer: more changes a vocabulary of this size little, and costs time


class Tokenizer(Protocol):
    """vocab_size V; eod_id ends a document; encode never yields it; fingerprint is the SHA-256 of the model file."""

    vocab_size: int
    eod_id: int

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def fingerprint(self) -> str: ...


class SentencePieceTokenizer:
    """A sentencepiece model. Its end-of-sentence piece, which a text cannot produce, ends documents."""

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"tokenizer {path}: {(error.strerror or 'unreadable').lower()}; make one with "
                "`overtok train-tokenizer`, or correct tokenizer.path"
            ) from None
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError:
            raise DataError(f"tokenizer {path}: not a sentencepiece model") from None
        self._digest = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.eod_id: int = self._processor.eos_id()
        if self.eod_id < 0:
            raise DataError(f"tokenizer {path}: has no end-of-sentence piece to end documents with; train one that has")

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._processor.EncodeAsIds(text)
        return tokens

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        tokens: list[list[int]] = self._processor.Encode(texts, num_threads=-1)
        return tokens

    def decode(self, tokens: list[int]) -> str:
        text: str = self._processor.DecodeIds(tokens)
        return text

    def fingerprint(self) -> str:
        return self._digest


_KINDS: dict[str, Callable[[Path], Tokenizer]] = {"sentencepiece": SentencePieceTokenizer}


def load_tokenizer(kind: str, path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer` section. Raises DataError where the file is missing or of another kind."""
    return _KINDS[kind](Path(path))


def read_text(path: Path) -> str:
    """A file's text, line ends as they are. Raises DataError naming the file, and the byte that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from None


def train_sentencepiece(files: Iterable[Path], vocab_size: int, output: Path) -> None:
    """Train a BPE model of `vocab_size` pieces on text files and write it to `output`, whole or not at all.

    The text is taken as it is (no normalisation, spaces kept, unknown characters as bytes), so that decoding gives it
    back. Raises DataError on an empty corpus, or one too small for the vocabulary.
    """
    lines = [line for path in files for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise DataError("the corpus for the tokenizer is empty: the files hold no text")
    output.parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()  # not a file: its path would become part of the model, and of its fingerprint
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            eos_id=0,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            user_defined_symbols=["\n", "\n\n"],
            input_sentence_size=_SENTENCES,
            shuffle_input_sentence=False,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(_explain(str(error), vocab_size)) from None
    aside = output.with_name(output.name + ".partial")
    aside.write_bytes(model.getvalue())
    aside.replace(output)


def _explain(text: str, vocab_size: int) -> str:
    largest = re.search(r"value <= (\d+)", text)
    if largest:
        return f"the corpus is too small for a vocabulary of {vocab_size}; the largest that it carries is {largest[1]}"
    if "smaller than required_chars" in text or "required" in text:
        return (
            f"a vocabulary of {vocab_size} does not hold the 256 bytes and the corpus's characters; take a larger one"
        )
    return f"sentencepiece could not train a vocabulary of {vocab_size}: {text.splitlines()[0]}"
