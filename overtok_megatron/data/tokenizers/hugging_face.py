"""Tokenizers in Hugging Face's form, tokenizer.json, encoded by their library `tokenizers`."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from overtok_megatron.errors import DataError
from overtok_megatron.files import decode_text

END_OF_TEXT = "<|endoftext|>"


class HuggingFaceTokenizer:
    """A tokenizer.json, or the folder that holds one. Special-token strings in a text are encoded as ordinary text.

    Nothing is added around a text, padded or cut, whatever the file asks for. Added tokens that are not special (runs of
    spaces, placeholders) are found in a text as any other piece.
    """

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            self._content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"tokenizer {path}: {(error.strerror or 'unreadable').lower()}; correct tokenizer.path"
            ) from None
        try:
            self._tokenizer = _build(self._content)
        except Exception as error:  # the library raises bare Exception
            reason = (str(error).splitlines() or ["unreadable"])[0][:120]
            raise DataError(f"tokenizer {path}: not a Hugging Face tokenizer.json ({reason})") from None
        self._digest = hashlib.sha256(self._content).hexdigest()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values()) + 1  # ids may have gaps
        wanted = eod_token or END_OF_TEXT
        if wanted not in ids:
            special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
            raise DataError(
                f"tokenizer {path}: has no token {wanted!r} to end documents with; name one as tokenizer.eod_token "
                f"(--eod-token): {', '.join(special) or 'it has no special tokens'}"
            )
        self.eod_id: int = ids[wanted]
        if self.eod_id in self.encode(wanted):
            raise DataError(
                f"tokenizer {path}: a text can spell its token {wanted!r}, so that it cannot end documents; name a special "
                "token as tokenizer.eod_token (--eod-token)"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the tokenizer again from the file's bytes, in a worker: one that the library pickled loses its setting for
        special tokens, and fragments the heap, so that it encodes a tenth slower.
        """
        self.__dict__.update(state)
        self._tokenizer = _build(self._content)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str], threads: int = -1) -> list[list[int]]:
        """As `encode` for each text; the library reads the number of threads from TOKENIZERS_PARALLELISM."""
        return [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def undecided(self, token: int) -> bool:
        falls_back, fuses = self._decoder
        if not falls_back:
            return fuses
        piece = self._tokenizer.id_to_token(token)  # an id without a piece does not end a run of bytes
        return fuses or piece is None or (len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"))

    @cached_property
    def _decoder(self) -> tuple[bool, bool]:
        return _decoding(
            json.loads(decode_text(self._content)).get("decoder")
        )  # 0.1 s for 100,000 pieces: where text is streamed only

    def fingerprint(self) -> str:
        return self._digest


def _build(content: bytes) -> tokenizers.Tokenizer:
    """The file's tokenizer without padding, truncation and special-token strings in a text."""
    tokenizer = tokenizers.Tokenizer.from_str(decode_text(content))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _decoding(decoder: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether a file's decoder does more than to join tokens one by one: (it decodes runs of bytes, anything else).

    A run of byte pieces is one text or, where a single byte is wrong, nothing but replacement characters, so its
    text is undecided until it ends. What changes the joined text, repeated tokens or the last one may change any of it.
    """
    pending, joined, runs = [decoder] if decoder else [], False, False
    while pending:
        step = pending.pop(0)
        kind = step["type"]
        if kind == "Sequence":
            pending = step["decoders"] + pending
        elif joined:
            if kind != "Fuse" and not (kind == "Strip" and step["stop"] == 0):
                return runs, True
        elif kind in ("Fuse", "ByteLevel"):
            joined = True
        elif kind == "ByteFallback":
            runs = True
        elif kind not in ("Replace", "Strip", "Metaspace", "WordPiece"):  # these change each token by itself
            return runs, True
    return runs, False
