"""Order and batches: every layout trains on the same samples, an epoch is whole, and counts pass 2^31."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.data.batches import validation_batches
from overtok_megatron.data.blending import WeightedDataset
from overtok_megatron.data.indexed import IndexedDataset, IndexedWriter
from overtok_megatron.data.sampler import SampleOrder
from support.dataset_factory import train_batches, write_dataset


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
        batch = train_batches(dataset, 7, micro, accumulation, rank, ranks, seed=seed).read(first)
        assert batch.shape == (accumulation, micro, 8)
        assert batch.dtype == np.int64
        for j in range(accumulation):
            for row in range(micro):
                offset = order.offset(first + (j * ranks + rank) * micro + row)
                assert batch[j, row].tolist() == list(range(offset, offset + 8))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_gives_every_target_once(dataset: IndexedDataset, ranks: int) -> None:
    parts = [train_batches(dataset, 5, 2, 1, rank, ranks, seed=1) for rank in range(ranks)]
    targets = [part.read(step * 2 * ranks)[..., 1:] for step in range(60 // (2 * ranks)) for part in parts]
    assert sorted(np.concatenate(targets, axis=None).tolist()) == list(range(1, 301))


def test_steps_need_no_memory_of_each_other(dataset: IndexedDataset) -> None:
    walked = train_batches(dataset, 7, 4, 2, seed=9)
    seen = [walked.read(8 * step) for step in range(12)]
    jumped = train_batches(dataset, 7, 4, 2, seed=9)
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
    batches = train_batches(dataset, 2**16 + 1, 1, seed=0)
    last = (total - 1) // (2**16 + 1) - 1
    order = SampleOrder(total, 2**16 + 1, 0, "set")
    step = next(step for step in range(last + 1) if order.offset(step) == last * (2**16 + 1))
    assert (batches.read(step)[0, 0] == dataset.tokens(last * (2**16 + 1), 2**16 + 2)).all()


def stream(dataset: IndexedDataset, start: int, length: int) -> list[int]:
    """Tokens one by one from the file, IGNORE_INDEX behind its end."""
    content = np.fromfile(f"{dataset.prefix}.bin", np.uint16).tolist()
    return [content[index] if index < len(content) else IGNORE_INDEX for index in range(start, start + length)]


@pytest.mark.parametrize("extra_tokens", [1, 2, 3, 9])
@pytest.mark.parametrize("num_tokens", [41, 42, 47, 48])
def test_samples_carry_further_tokens_of_the_stream(tmp_path: Path, num_tokens: int, extra_tokens: int) -> None:
    """Their number and their order stay; at the end of a set, in every epoch, those that are not there are not scored."""
    sets = [
        WeightedDataset(write_dataset(tmp_path / "a", [list(range(1, num_tokens + 1))]), 2.0),
        WeightedDataset(write_dataset(tmp_path / "b", [list(range(500, 525))]), 1.0),
    ]
    usual = train_batches(sets, 8, 2, 2, rank=1, ranks=2, seed=3)
    longer = train_batches(sets, 8, 2, 2, rank=1, ranks=2, seed=3, extra_tokens=extra_tokens)
    assert longer.shape == (2, 2, 8 + extra_tokens)
    ended = 0
    for step in range(12):  # about seven epochs
        samples = longer.read(8 * step)
        assert (samples[..., :9] == usual.read(8 * step)).all()
        assert longer.epochs(8 * step) == usual.epochs(8 * step)
        for sample in samples.reshape(-1, 8 + extra_tokens).tolist():
            dataset = sets[sample[0] >= 500].dataset
            assert sample == stream(dataset, sample[0] - (500 if sample[0] >= 500 else 1), 8 + extra_tokens)
            ended += IGNORE_INDEX in sample
    assert (ended > 0) == (extra_tokens > 1)  # set b always ends behind the first target of a sample


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(2, 90),
    length=st.integers(1, 12),
    batch=st.integers(1, 4),
    ranks=st.integers(1, 3),
    extra_tokens=st.integers(1, 14),
)
def test_validation_scores_every_token_once_for_every_head(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int, batch: int, ranks: int, extra_tokens: int
) -> None:
    dataset = write_dataset(tmp_path_factory.mktemp("v") / "set", [list(range(1, tokens + 1))])
    scored: list[list[int]] = [[] for _ in range(extra_tokens)]
    for rank in range(ranks):
        usual = list(validation_batches(dataset, length, batch, rank, ranks))
        longer = list(validation_batches(dataset, length, batch, rank, ranks, extra_tokens=extra_tokens))
        unread = validation_batches(dataset, length, batch, rank, ranks, extra_tokens=extra_tokens, read=False)
        assert [(one.shape, other.shape) for one, other in unread] == [
            (one.shape, other.shape) for one, other in longer
        ]
        for (inputs, targets), (first_inputs, first_targets) in zip(longer, usual, strict=True):
            assert (inputs == first_inputs).all()
            assert (targets[:, : inputs.shape[1]] == first_targets).all()
            for ahead in range(extra_tokens):
                own = targets[:, ahead : ahead + inputs.shape[1]]
                known = own != IGNORE_INDEX
                assert (own[known] == inputs[known] + 1 + ahead).all()
                scored[ahead] += own[known].tolist()
    for ahead in range(extra_tokens):
        assert sorted(scored[ahead]) == list(range(2 + ahead, tokens + 1))
