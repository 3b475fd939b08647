"""sentencepiece models as tokenizers. No text yields the end-of-document token. Not here: training (preparing/)."""

import hashlib
from functools import cached_property
from pathlib import Path

import sentencepiece

from overtok_megatron.errors import DataError

_DENORMALIZER = 5  # field of a sentencepiece model
_SPACE_MARK = "\u2581"  # sentencepiece's own sign for a space: as text it would come back as one


class SentencePieceTokenizer:
    """A sentencepiece model. A control piece, which no text can produce, ends documents: its end-of-sentence, or eod_token."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
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
        named = eod_token is not None
        self.eod_id: int = self._processor.eos_id() if eod_token is None else self._processor.PieceToId(eod_token)
        if self.eod_id < 0 or not self._processor.IsControl(self.eod_id):
            wanted = f"control piece {eod_token!r}" if named else "end-of-sentence control piece"
            raise DataError(
                f"tokenizer {path}: has no {wanted} to end documents with; "
                + ("name another as tokenizer.eod_token" if named else "train one with `overtok train-tokenizer`")
            )
        self._space_mark_bytes = self._bytes_of_space_mark()

    def _bytes_of_space_mark(self) -> list[int]:
        """The byte pieces of the sign for a space; none where the model adds a space before a text or has no byte pieces."""
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

    def encode_batch(self, texts: list[str], threads: int = -1) -> list[list[int]]:
        """As `encode` for each text."""
        tokens: list[list[int]] = self._processor.Encode(texts, num_threads=threads)
        if self._space_mark_bytes:
            for index, text in enumerate(texts):
                if _SPACE_MARK in text:
                    tokens[index] = self.encode(text)
        return tokens

    def decode(self, tokens: list[int]) -> str:
        text: str = self._processor.DecodeIds(tokens)
        return text

    def undecided(self, token: int) -> bool:
        """Where no rules rewrite a decoded text, only a space at its beginning is dropped, and bytes that are not a character
        are shown one by one: neither changes with what follows."""
        return self._rewrites

    @cached_property
    def _rewrites(self) -> bool:
        """Whether the model has rules that rewrite a decoded text. The library does not say, so the model file is read."""
        content = self._processor.serialized_model_proto()
        offset = 0
        while offset < len(content):  # one message of protobuf's, all of whose fields have a length
            tag, offset = _varint(content, offset)
            size, offset = _varint(content, offset)
            if tag >> 3 == _DENORMALIZER and size:
                return True
            offset += size
        return False

    def fingerprint(self) -> str:
        return self._digest


def _varint(content: bytes, offset: int) -> tuple[int, int]:
    """(the number that protobuf wrote at `offset`, the offset behind it)"""
    value = shift = 0
    while content[offset] >= 128:
        value |= (content[offset] & 127) << shift
        offset, shift = offset + 1, shift + 7
    return value | content[offset] << shift, offset + 1
