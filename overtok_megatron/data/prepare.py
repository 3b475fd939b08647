"""Text files to an indexed dataset, one document a file. All or nothing: an error leaves no file behind."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from overtok_megatron.data.indexed import DatasetManifest, IndexedWriter
from overtok_megatron.data.tokenizer import Tokenizer, read_text
from overtok_megatron.errors import DataError

_BATCH_CHARACTERS = 1 << 22  # encoded at once by all threads; bounds memory


def expand(inputs: Sequence[str | Path]) -> list[Path]:
    """Files as they are, folders as the .txt files below them, in sorted order. Raises DataError on a missing one."""
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            files += sorted(path.rglob("*.txt"))
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return files


def _batches(files: Sequence[Path]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for path in files:
        batch.append(read_text(path))
        size += len(batch[-1])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def prepare(
    files: Sequence[Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    advance: Callable[[int], object] = lambda size: None,
) -> DatasetManifest:
    """Tokenize `files` into the dataset `prefix`; `advance` is told the source bytes of each finished batch.

    Raises DataError on non-UTF-8 text (file and byte), or where there is no text at all.
    """
    with IndexedWriter(prefix, tokenizer.vocab_size, tokenizer.eod_id, tokenizer.fingerprint()) as writer:
        found = False
        for texts in _batches(files):
            for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
                if tokens:
                    writer.add([*tokens, tokenizer.eod_id], len(text.encode()))
                    found = True
            advance(sum(len(text.encode()) for text in texts))
        if not found:
            raise DataError(
                f"the corpus is empty: {len(files)} files hold no text; name files or folders with .txt files"
            )
        return writer.finish()
