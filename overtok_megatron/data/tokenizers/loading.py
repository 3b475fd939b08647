"""A tokenizer of any kind from its file."""

import codecs
from pathlib import Path

from overtok_megatron.config.schema import TokenizerConfig
from overtok_megatron.data.tokenizers.bytes import ByteTokenizer
from overtok_megatron.data.tokenizers.hugging_face import HuggingFaceTokenizer
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer


def load_tokenizer(kind: str, path: str | Path | None, eod_token: str | None = None) -> Tokenizer:
    """The tokenizer of a kind, as the `tokenizer` section calls them; path None for kind bytes, which has no file.

    Raises DataError where the file is missing or of another kind, or has no such end-of-document token.
    """
    if kind == "bytes":
        return ByteTokenizer()
    assert path is not None
    if kind == "hugging_face":
        return HuggingFaceTokenizer(Path(path), eod_token)
    return SentencePieceTokenizer(Path(path), eod_token)


def configured_tokenizer(section: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a `tokenizer` section names. Raises DataError as load_tokenizer does."""
    return load_tokenizer(section.type, section.path, section.eod_token)


def infer_kind(path: Path) -> str:
    """The kind of a tokenizer file by its content: JSON, or a folder with tokenizer.json, is Hugging Face's."""
    if path.is_dir():
        return "hugging_face"
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return "sentencepiece"  # loading it says what is wrong
    marked = head.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "hugging_face" if marked or head.lstrip().startswith(b"{") else "sentencepiece"
