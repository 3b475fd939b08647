"""Tokenizers that put a space before a text's first piece: sentencepiece's default, and the same as Llama's tokenizer.json."""

import io
from pathlib import Path

import sentencepiece

from overtok_megatron.data.sotu import sotu_files
from overtok_megatron.data.tokenizers.loading import load_tokenizer
from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.interchange.tokenizer_files import from_sentencepiece

KINDS = ("sentencepiece", "hugging_face")
FILES = {"sentencepiece": "tokenizer.model", "hugging_face": "tokenizer.json"}


def save_prefixed(folder: Path, vocab_size: int = 512) -> dict[str, Tokenizer]:
    """Both kinds, by name, of a model that sentencepiece trains by its defaults; in `FILES` below `folder`."""
    lines = "".join(path.read_text(encoding="utf-8") for path in sotu_files()[:2]).splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size, minloglevel=2,
        eos_id=0, unk_id=1, bos_id=-1, byte_fallback=True,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    made = from_sentencepiece(folder / "tokenizer.model")
    assert made is not None
    made.save(str(folder / "tokenizer.json"))
    loaded: dict[str, Tokenizer] = {
        "sentencepiece": load_tokenizer("sentencepiece", folder / "tokenizer.model"),
        "hugging_face": load_tokenizer("hugging_face", folder / "tokenizer.json", "</s>"),
    }
    sentence = "the state of the union, and of the"
    assert loaded["sentencepiece"].encode(sentence) == loaded["hugging_face"].encode(sentence)
    assert loaded["sentencepiece"].encode("the") != loaded["sentencepiece"].encode("e the")[-2:]  # a prefix, no more
    return loaded
