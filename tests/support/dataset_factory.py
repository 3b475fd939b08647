"""Datasets made of given documents, and batches of them."""

from collections.abc import Sequence
from pathlib import Path

from overtok_megatron.data.batches import TrainBatches
from overtok_megatron.data.blending import WeightedDataset
from overtok_megatron.data.indexed import IndexedDataset, IndexedWriter


def write_dataset(
    prefix: Path, documents: list[list[int]], vocab_size: int = 1000, fingerprint: str = "fingerprint"
) -> IndexedDataset:
    with IndexedWriter(prefix, vocab_size, 0, fingerprint) as writer:
        for document in documents:
            writer.add(document, len(document))
        writer.finish()
    return IndexedDataset(prefix)


def train_batches(
    datasets: IndexedDataset | Sequence[WeightedDataset],
    seq_length: int,
    micro_batch_size: int,
    num_micro_batches: int = 1,
    rank: int = 0,
    ranks: int = 1,
    *,
    seed: int,
    extra_tokens: int = 1,
) -> TrainBatches:
    return TrainBatches(
        datasets,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        seed=seed,
        extra_tokens=extra_tokens,
    )
