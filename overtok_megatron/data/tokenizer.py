"""Tokenizers behind one small protocol; training one with sentencepiece. Token 0 ends a document and no text yields it."""

import hashlib
import io
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece

from overtok_megatron.errors import DataError

_MAX_SENTENCE_BYTES = 1 << 16  # the trainer drops longer ones without a word
_MAX_LINE_CHARACTERS = _MAX_SENTENCE_BYTES // 4  # so longer lines are cut: a character takes at most 4 bytes
_SENTENCES = 100_000  # sampled for training a tokenizer: more changes a vocabulary of this size little, and costs time
_SPACE_MARK = "\u2581"  # sentencepiece's own sign for a space: as text it would come back as one


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
        if self.eod_id < 0 or not self._processor.IsControl(self.eod_id):
            raise DataError(
                f"tokenizer {path}: has no end-of-sentence control piece to end documents with; train one with "
                "`overtok train-tokenizer`"
            )
        self._space_mark_bytes = self._bytes_of_space_mark()

    def _bytes_of_space_mark(self) -> list[int]:
        """The byte pieces that spell the sign for a space; none where the model prefixes a text or has no bytes."""
        pieces: list[int] = [self._processor.PieceToId(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        exact = all(map(self._processor.IsByte, pieces)) and self._processor.EncodeAsPieces("a")[0][0] != _SPACE_MARK
        return pieces if exact else []

    def encode(self, text: str) -> list[int]:
        if self._space_mark_bytes and _SPACE_MARK in text:
            first, *others = text.split(_SPACE_MARK)
            result = self.encode(first)
            for part in others:
                result += self._space_mark_bytes + self.encode(part)
            return result
        tokens: list[int] = self._processor.EncodeAsIds(text)
        return tokens

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As `encode` for each text, on all cores."""
        tokens: list[list[int]] = self._processor.Encode(texts, num_threads=-1)
        if self._space_mark_bytes:
            for index, text in enumerate(texts):
                if _SPACE_MARK in text:
                    tokens[index] = self.encode(text)
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
    back. At most 100,000 lines, drawn evenly from the whole corpus, are looked at; the same files give the same
    model byte for byte. Raises DataError on an empty corpus, one too small for the vocabulary, or a failing disk.
    """
    lines = _sample(_lines(files), _SENTENCES)
    if not lines:
        raise DataError("the corpus for the tokenizer is empty: the files hold no text")
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
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(model.getvalue())
            aside.replace(output)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"tokenizer {output}: cannot be written ({error.strerror or error}); free space or name another file"
        ) from None


def _lines(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        for line in read_text(path).splitlines():
            if line.strip():
                for begin in range(0, len(line), _MAX_LINE_CHARACTERS):
                    yield line[begin : begin + _MAX_LINE_CHARACTERS]


def _sample(lines: Iterable[str], size: int) -> list[str]:
    """At most `size` lines, each as likely as any other (reservoir sampling): memory is that of the sample."""
    generator = random.Random(0)
    kept: list[str] = []
    for seen, line in enumerate(lines):
        if seen < size:
            kept.append(line)
        elif (place := generator.randrange(seen + 1)) < size:
            kept[place] = line
    return kept


def _explain(text: str, vocab_size: int) -> str:
    largest = re.search(r"value <= (\d+)", text)
    if largest:
        return f"the corpus is too small for a vocabulary of {vocab_size}; the largest that it carries is {largest[1]}"
    if "smaller than required_chars" in text or "required" in text:
        return (
            f"a vocabulary of {vocab_size} does not hold the 256 bytes and the corpus's characters; take a larger one"
        )
    return f"sentencepiece could not train a vocabulary of {vocab_size}: {text.splitlines()[0]}"
