"""Bytes as tokens: no file, nothing to train. Token b is byte b; 256 ends a document."""

import hashlib


class ByteTokenizer:
    """V = 257. Decoding shows bytes that are not UTF-8 as the replacement character."""

    vocab_size: int = 257
    eod_id: int = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str], threads: int = -1) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def undecided(self, token: int) -> bool:
        return False

    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes, end of document 256").hexdigest()
