"""Blends: shares hold at every moment, every set is gone through in its own order, and nothing depends on ranks or history."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overtok_megatron.config.loading import load_config
from overtok_megatron.data import sampler
from overtok_megatron.data.blending import BlendOrder, Interleaving, WeightedDataset, unique_names
from overtok_megatron.data.sampler import SampleOrder, permuted
from overtok_megatron.errors import ConfigError
from support.dataset_factory import train_batches, write_dataset

WEIGHTS = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS, begin=st.integers(0, 10**15))
def test_each_set_gets_its_samples_in_order(weights: list[float], begin: int) -> None:
    order = Interleaving(weights)
    counts = order.counts(begin)
    assert sum(counts) == begin
    for sample in range(begin, begin + 50):
        index, own = order.locate(sample)
        assert own == counts[index]
        counts[index] += 1
        assert order.counts(sample + 1) == counts
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (sample + 1) * weight / sum(weights)) <= len(weights) + (sample + 1) * 1e-12


def test_weights_have_any_scale() -> None:
    small, large = Interleaving([0.7, 0.2, 0.1]), Interleaving([7, 2, 1])
    assert small.counts(1000) == large.counts(1000) == [700, 200, 100]
    assert [large.locate(sample)[0] for sample in range(10)].count(0) == 7
    assert Interleaving([1e-300, 1e300]).locate(0) == (1, 0)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[WeightedDataset]:
    """Three sets whose tokens tell which set and place they come from."""
    folder = tmp_path_factory.mktemp("sets")
    lengths = (101, 301, 51)
    made = [
        write_dataset(folder / f"s{i}", [list(range(1000 * i, 1000 * i + size))], 5000)
        for i, size in enumerate(lengths)
    ]
    return [WeightedDataset(dataset, weight) for dataset, weight in zip(made, (3, 1, 0.5), strict=True)]


def test_every_set_is_shuffled_as_it_would_be_alone(sets: list[WeightedDataset]) -> None:
    order = BlendOrder(sets, 10, 7)
    alone = [SampleOrder(one.dataset.num_tokens, 10, 7, "set") for one in sets]
    seen = Counter[int]()
    for sample in range(200):
        index, start = order.locate(sample)
        assert start == alone[index].offset(seen[index])
        seen[index] += 1
    assert order.epochs(200) == {"s0": seen[0] / 10, "s1": seen[1] / 30, "s2": seen[2] / 5}
    assert seen[0] == pytest.approx(200 * 3 / 4.5, abs=1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_and_history_do_not_show(sets: list[WeightedDataset], ranks: int) -> None:
    whole = train_batches(sets, 10, 12, seed=5)
    parts = [train_batches(sets, 10, 2, 6 // ranks, rank, ranks, seed=5) for rank in range(ranks)]
    for step in (9, 0, 100_000):
        together = np.concatenate([part.read(12 * step) for part in parts], axis=1)
        assert (together.reshape(12, 11) == whole.read(12 * step)[0]).all()


def test_a_blend_of_one_is_the_set_itself(sets: list[WeightedDataset]) -> None:
    alone, blend = (train_batches(one, 10, 4, 2, seed=5) for one in (sets[1].dataset, sets[1:2]))
    for step in range(20):
        assert (alone.read(8 * step) == blend.read(8 * step)).all()


def test_names_tell_sets_apart() -> None:
    assert unique_names(["data/a", "data/b"]) == ["a", "b"]
    assert unique_names(["x/train", "y/train"]) == ["x/train", "y/train"]
    assert unique_names(["x/a", "x/a"]) == ["x/a#0", "x/a#1"]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 400), keys=st.lists(st.integers(0, 2**63 - 1), min_size=6, max_size=6).map(tuple))
def test_the_keyed_shuffle_is_a_permutation(size: int, keys: tuple[int, ...]) -> None:
    assert sorted(permuted(index, size, keys) for index in range(size)) == list(range(size))


def test_long_epochs_are_shuffled_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    order = SampleOrder((1 << 40) + 1, 1, 3, "set")  # 2^40 samples
    first = [order.offset(index) for index in range(1000)]
    assert len(set(first)) == 1000
    assert np.mean(first) / (1 << 40) == pytest.approx(0.5, abs=0.05)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.15
    assert first[:3] == [174410419009, 314892210456, 986153076243]  # the order never changes between releases
    monkeypatch.setattr(sampler, "_KEPT", 50)
    short = SampleOrder(1001, 10, 3, "set")
    epochs = [[short.offset(epoch * 100 + index) for index in range(100)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(0, 1000, 10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[{path: a, weight: 0}]", "data.train.0.weight: 0 should be greater than 0"),
        ("[{path: a, weight: 1}, {path: b, wieght: 1}]", "unknown key data.train.1.wieght; data.train is the prefix"),
        ("[{path: a}]", "data.train.0.weight is missing"),
        ("[a]", "data.train.0: 'a' should be a mapping (prefix of the training set"),
        ("[]", "data.train: [] List should have at least 1 item"),
        ("3", "data.train: 3 should be a valid string"),
    ],
)
def test_what_is_no_blend(value: str, said: str) -> None:
    path = Path(__file__).parent.parent.parent / "configs" / "quickstart_overtok.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"data.train={value}"])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_blend_in_a_configuration(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent.parent / "configs" / "quickstart_overtok.yaml"
    config = load_config(path, ["data.train=[{path: a, weight: 1}, {path: b, weight: 2.5}]"]).config
    assert isinstance(config.data.train, list)
    assert [(one.path, one.weight) for one in config.data.train] == [("a", 1.0), ("b", 2.5)]
