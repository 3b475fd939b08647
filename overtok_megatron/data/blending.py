"""Several training sets as one order of samples: which sample is drawn from which set, by arithmetic alone.

Sample i of the run goes to a set and is that set's j-th; both follow from i and the weights, in constant time and without
a table, so that order and resuming depend neither on the world size nor on what came before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.sampler import SampleOrder


@dataclass(frozen=True)
class WeightedDataset:
    """A set and its weight, at any scale: its share of the samples is its weight over the sum of all weights."""

    dataset: IndexedDataset
    weight: float


class Interleaving:
    """Sample i -> (set, j). Of the first n samples each set has its share of n to within the number of sets.

    The sets are split off one after the other. With p the first set's share of what is left, sample i goes to it where a whole
    number lies between i p and (i + 1) p; the others are the samples 0, 1, ... of the remaining sets. Exact, in integers.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(repr(weight)) for weight in weights]  # 0.1 is a tenth, as its writer meant
        assert exact and min(exact) > 0
        self._shares = [share / sum(exact[index:]) for index, share in enumerate(exact)]

    def locate(self, sample: int) -> tuple[int, int]:
        """(set, number of the sample within that set) of a sample of the run."""
        for index, share in enumerate(self._shares):
            before = _floor(sample, share)
            if _floor(sample + 1, share) > before:
                return index, before
            sample -= before
        raise AssertionError("the last set's share is 1")

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` come from each set."""
        result = []
        for share in self._shares:
            result.append(_floor(samples, share))
            samples -= result[-1]
        return result


def _floor(samples: int, share: Fraction) -> int:
    return samples * share.numerator // share.denominator


class BlendOrder:
    """Sample of the run -> (set, first token in it); each set is shuffled epoch by epoch as it would be alone."""

    def __init__(self, sets: Sequence[WeightedDataset], seq_length: int, seed: int) -> None:
        self._interleaving = Interleaving([one.weight for one in sets])
        self._orders = [SampleOrder(one.dataset.num_tokens, seq_length, seed, one.dataset.prefix) for one in sets]
        self._names = unique_names([one.dataset.prefix for one in sets])

    def locate(self, sample: int) -> tuple[int, int]:
        """(set, first token of the sample in it)."""
        index, own = self._interleaving.locate(sample)
        return index, self._orders[index].offset(own)

    def sample_id(self, sample: int) -> tuple[str, int]:
        """(name of the set, index of the sample in it, which begins at token index x seq_length) of a sample of the run."""
        index, own = self._interleaving.locate(sample)
        order = self._orders[index]
        return self._names[index], order.offset(own) // order.seq_length

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each set has been gone through after so many samples of the run, by name."""
        counts = self._interleaving.counts(samples)
        return {
            name: count / order.samples_per_epoch
            for name, count, order in zip(self._names, counts, self._orders, strict=True)
        }


def unique_names(prefixes: Sequence[str]) -> list[str]:
    """The last parts of paths, with as many folders as make them differ, or a number where paths are the same."""
    for depth in range(1, max(len(Path(prefix).parts) for prefix in prefixes) + 1):
        names = ["/".join(Path(prefix).parts[-depth:]) for prefix in prefixes]
        if len(set(names)) == len(names):
            return names
    return [f"{prefix}#{index}" for index, prefix in enumerate(prefixes)]
