"""Order and batches: every layout trains on the same samples, an epoch is whole, and counts pass 2^31."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtok_megatron.data.batches import TrainBatches
from overtok_megatron.data.indexed import IndexedDataset, IndexedWriter
from overtok_megatron.data.sampler import SampleOrder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    """Tokens 0..300, so that a sample's tokens tell where it lies."""
    prefix = tmp_path_factory.mktemp("set") / "set"
    with IndexedWriter(prefix, 1000, 0, "fingerprint") as writer:
        writer.add(list(range(301)), 301)
        writer.finish()
    return IndexedDataset(prefix)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 3),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    step=st.integers(0, 40),
    seed=st.integers(0, 2**63),
)
def test_a_micro_batch_is_where_the_rule_puts_it(
    dataset: IndexedDataset, ranks: int, micro: int, accumulation: int, step: int, seed: int
) -> None:
    order = SampleOrder(dataset.num_tokens, 7, seed, "set")
    first = step * ranks * micro * accumulation  # steps run over several epochs of 42 samples
    for rank in range(ranks):
        batch = TrainBatches(dataset, 7, micro, accumulation, rank, ranks, seed).read(first)
        assert batch.shape == (accumulation, micro, 8)
        assert batch.dtype == np.int64
        for j in range(accumulation):
            for row in range(micro):
                offset = order.offset(first + (j * ranks + rank) * micro + row)
                assert batch[j, row].tolist() == list(range(offset, offset + 8))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_gives_every_target_once(dataset: IndexedDataset, ranks: int) -> None:
    parts = [TrainBatches(dataset, 5, 2, 1, rank, ranks, seed=1) for rank in range(ranks)]
    targets = [part.read(step * 2 * ranks)[..., 1:] for step in range(60 // (2 * ranks)) for part in parts]
    assert sorted(np.concatenate(targets, axis=None).tolist()) == list(range(1, 301))


def test_steps_need_no_memory_of_each_other(dataset: IndexedDataset) -> None:
    walked = TrainBatches(dataset, 7, 4, 2, 0, 1, seed=9)
    seen = [walked.read(8 * step) for step in range(12)]
    jumped = TrainBatches(dataset, 7, 4, 2, 0, 1, seed=9)
    for step in (11, 0, 6, 5):
        assert (jumped.read(8 * step) == seen[step]).all()


def test_seeds_and_epochs_shuffle_differently() -> None:
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        order = SampleOrder(1001, 10, seed, "set")
        return tuple(order.offset(number * 100 + index) for index in range(100))

    assert len({epoch(seed, number) for seed in range(4) for number in range(4)}) == 16
    assert epoch(0, 0) != tuple(range(0, 1000, 10))


def test_the_order_never_changes_between_releases() -> None:
    order = SampleOrder(81, 10, 1234, "set")
    assert [order.offset(index) // 10 for index in range(16)] == [3, 1, 6, 4, 5, 2, 7, 0, 4, 2, 0, 5, 7, 1, 6, 3]


def test_tokens_past_two_to_the_31(tmp_path: Path) -> None:
    lengths = [2**31 - 1, 19]
    total = sum(lengths)
    with (tmp_path / "set.bin").open("wb") as file:  # a hole of 4 GiB, which takes no space
        file.truncate(total * 2 - 8)
        file.seek(total * 2 - 8)
        file.write(np.array([7, 8, 9, 0], dtype=np.uint16).tobytes())
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    index += struct.pack("<2i2q3q", *lengths, 0, lengths[0] * 2, 0, 1, 2)
    (tmp_path / "set.idx").write_bytes(index)
    manifest = {"vocab_size": 10, "eod_id": 0, "tokenizer_fingerprint": "f", "num_documents": 2, "num_tokens": total}
    manifest |= {"source_bytes": 1, "bin_sha256": "", "idx_sha256": ""}
    (tmp_path / "set.json").write_text(json.dumps(manifest))
    dataset = IndexedDataset(tmp_path / "set")
    assert dataset.num_tokens == 2**31 + 18
    assert dataset.tokens(total - 4, 4).tolist() == [7, 8, 9, 0]
    batches = TrainBatches(dataset, 2**16 + 1, 1, 1, 0, 1, seed=0)
    last = (total - 1) // (2**16 + 1) - 1
    order = SampleOrder(total, 2**16 + 1, 0, "set")
    step = next(step for step in range(last + 1) if order.offset(step) == last * (2**16 + 1))
    assert (batches.read(step)[0, 0] == dataset.tokens(last * (2**16 + 1), 2**16 + 2)).all()
