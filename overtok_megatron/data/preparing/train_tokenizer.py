"""Train a sentencepiece tokenizer on corpus files: `overtok train-tokenizer`."""

import io
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from overtok_megatron.data.preparing.sources import ReadOptions, read_documents
from overtok_megatron.errors import DataError, OutputError
from overtok_megatron.files import refuse_foreign, refuse_inputs, write_atomically

_MAX_SENTENCE_BYTES = 1 << 16  # the trainer drops longer ones without a message
_MAX_LINE_CHARACTERS = _MAX_SENTENCE_BYTES // 4  # so longer lines are cut: a character takes at most 4 bytes
_SENTENCES = 100_000  # sampled for training a tokenizer: more changes a vocabulary of this size little, and costs time


def train_sentencepiece(
    files: Iterable[Path],
    vocab_size: int,
    output: Path,
    reading: ReadOptions = ReadOptions(),  # noqa: B008  # frozen
) -> None:
    """Train a BPE model of `vocab_size` pieces on corpus files and write it to `output`, whole or not at all.

    The text is taken as it is (no normalisation, spaces kept, unknown characters as bytes), so that decoding gives it
    back. At most 100,000 lines, drawn evenly from the whole corpus, are looked at; the same files give the same
    model byte for byte. Raises DataError on an empty corpus, one too small for the vocabulary, or a failing disk; OutputError
    where `output` is one of `files`, or exists and is not the same model: sets may have been made with it.
    """
    files = list(files)
    refuse_inputs([output], files)
    refuse_foreign(output, _is_model, "a sentencepiece model")
    lines = _sample(_lines(read_documents(files, reading)), _SENTENCES)
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
    content = model.getvalue()
    if output.exists() and output.read_bytes() != content:
        raise OutputError(
            f"{output}: another tokenizer is there already, with which sets may have been made; move it away, or name another "
            "--output"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, content)
    except OSError as error:
        raise DataError(
            f"tokenizer {output}: cannot be written ({error.strerror or error}); free space or name another file"
        ) from None


def _is_model(path: Path) -> bool:
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError):
        return False
    return True


def _lines(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for line in text.splitlines():
            if line.strip():
                for begin in range(0, len(line), _MAX_LINE_CHARACTERS):
                    yield line[begin : begin + _MAX_LINE_CHARACTERS]


def _sample(lines: Iterable[str], size: int) -> list[str]:
    """At most `size` lines, each with the same probability (reservoir sampling), in the memory of the sample."""
    generator = random.Random(0)
    kept: list[str] = []
    for seen, line in enumerate(lines):
        if seen < size:
            kept.append(line)
        elif (index := generator.randrange(seen + 1)) < size:
            kept[index] = line
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
