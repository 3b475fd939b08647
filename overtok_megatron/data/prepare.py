"""Text files to an indexed dataset, one document a file or split at a separator. All or nothing: an error leaves no file.

Not here: other inputs than plain UTF-8 text (JSON lines, parquet), and any cleaning of the text.
"""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from overtok_megatron.data.indexed import DatasetManifest, IndexedWriter
from overtok_megatron.data.tokenizer import Tokenizer, read_text
from overtok_megatron.errors import DataError

_BATCH_CHARACTERS = 1 << 22  # encoded at once by all threads; bounds memory


def expand(inputs: Sequence[str | Path]) -> list[Path]:
    """Files as they are, folders as the .txt files below them, patterns as what they match; each in sorted order.

    Raises DataError on a missing file, a folder without text files, and a pattern that matches nothing.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_file():
            files.append(path)
            continue
        found: Iterable[Path]
        if path.is_dir():
            found, lack = path.rglob("*.txt"), "holds no .txt files, the corpus is empty"
        elif glob.has_magic(str(path)):
            found, lack = map(Path, glob.iglob(str(path), recursive=True)), "matches no file"
        else:
            raise DataError(f"{path}: no such file or folder")
        matches = sorted(match for match in found if match.is_file())
        if not matches:
            raise DataError(f"{path}: {lack}")
        files += matches
    return files


def _batches(files: Sequence[Path], separator: str | None) -> Iterator[tuple[list[str], int]]:
    """(documents, source bytes that they came from), many at a time; empty documents are dropped."""
    documents: list[str] = []
    size = source_bytes = 0
    for path in files:
        text = read_text(path)
        source_bytes += len(text.encode())
        documents += filter(None, [text] if separator is None else text.split(separator))
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield documents, source_bytes
            documents, size, source_bytes = [], 0, 0
    yield documents, source_bytes


def prepare(
    files: Sequence[Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    advance: Callable[[int], object] = lambda size: None,
    separator: str | None = None,
) -> DatasetManifest:
    """Tokenize `files` into the dataset `prefix`; `advance` is told the source bytes of each finished batch.

    A document is a file, or with a `separator` each part between two of them (which are dropped). Raises DataError on
    non-UTF-8 text (file and byte), where there is no text at all, or where the dataset cannot be written.
    """
    assert separator != "", "an empty separator splits nothing"
    try:
        with IndexedWriter(prefix, tokenizer.vocab_size, tokenizer.eod_id, tokenizer.fingerprint()) as writer:
            found = False
            for texts, source_bytes in _batches(files, separator):
                for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
                    if tokens:  # a tokenizer that normalises may leave nothing of a text
                        writer.add([*tokens, tokenizer.eod_id], len(text.encode()))
                        found = True
                advance(source_bytes)
            if not found:
                raise DataError(
                    f"the corpus is empty: {len(files)} files hold no text; name files or folders with .txt files"
                )
            return writer.finish()
    except OSError as error:  # reading has its own DataError, so this is the dataset
        raise DataError(
            f"dataset {prefix}: cannot be written ({error.strerror or error}); free space or name another prefix"
        ) from None
