"""Datasets made of given documents."""

from pathlib import Path

from overtok_megatron.data.indexed import IndexedDataset, IndexedWriter


def write_dataset(
    prefix: Path, documents: list[list[int]], vocab_size: int = 1000, fingerprint: str = "fingerprint"
) -> IndexedDataset:
    with IndexedWriter(prefix, vocab_size, 0, fingerprint) as writer:
        for document in documents:
            writer.add(document, len(document))
        writer.finish()
    return IndexedDataset(prefix)
