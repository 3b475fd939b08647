"""What the rest of the program knows of a tokenizer."""

from typing import Protocol


class Tokenizer(Protocol):
    """vocab_size V; eod_id ends a document; encode never yields it; fingerprint is the SHA-256 of the model file.

    threads: of encode_batch, -1 = one per core, where the library lets it be chosen.
    undecided: whether the text of the tokens up to this one may change with those that follow, other than by bytes that become
    a character. Where it may not, tokens that follow a non-empty text decode to the same text whatever that text is.
    """

    vocab_size: int
    eod_id: int

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: list[str], threads: int = -1) -> list[list[int]]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def undecided(self, token: int) -> bool: ...
    def fingerprint(self) -> str: ...
