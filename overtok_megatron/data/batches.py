"""From the order of samples to the arrays that a data-parallel rank trains and validates on.

Shapes: A micro-batches of a step, b micro batch, s sequence, k extra tokens of a sample.

A sample is s inputs and k further tokens of the stream: the last target of the next-token head (k = 1), and those of heads that
predict tokens further ahead. How many samples a set has, and where they begin, does not depend on k. The stream of a set may
end before the last samples have all of their extra tokens, which are IGNORE_INDEX there: as targets they are not scored, and
whoever reads them as inputs must put a token of the vocabulary in their place.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.data.blending import BlendOrder, WeightedDataset
from overtok_megatron.data.indexed import IndexedDataset

Tokens = npt.NDArray[np.int64]


class TrainBatches:
    """A step's global batch is the next `global batch` samples in order; every layout divides the same ones.

    Micro-batch j of data-parallel rank r holds samples first + (j ranks + r) b ... + b. Stateless: position in, arrays out.
    """

    def __init__(
        self,
        datasets: IndexedDataset | Sequence[WeightedDataset],
        *,
        seq_length: int,
        micro_batch_size: int,
        num_micro_batches: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        extra_tokens: int = 1,
    ) -> None:
        """extra_tokens: k, at least 1."""
        assert extra_tokens >= 1
        sets = [WeightedDataset(datasets, 1.0)] if isinstance(datasets, IndexedDataset) else datasets
        self._datasets = [one.dataset for one in sets]
        self._order = BlendOrder(sets, seq_length, seed)
        self._sample_length = seq_length + extra_tokens
        self._micro_batch_size = micro_batch_size
        self._num_micro_batches = num_micro_batches
        self._rank, self._ranks = data_parallel_rank, data_parallel_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what `read` returns: [A, b, s + k]."""
        return self._num_micro_batches, self._micro_batch_size, self._sample_length

    def read(self, first: int) -> Tokens:
        """This rank's samples of the step that begins with sample `first` of the order: [A, b, s + k] int64."""
        result = np.empty(self.shape, dtype=np.int64)
        for micro_batch in range(self._num_micro_batches):
            begin = self._begin(first, self._rank, micro_batch)
            for index in range(self._micro_batch_size):
                dataset, start = self._order.locate(begin + index)
                result[micro_batch, index] = _sample(self._datasets[dataset], start, self._sample_length)
        return result

    def _begin(self, first: int, rank: int, micro_batch: int) -> int:
        """The first sample of a micro-batch of a data-parallel rank, in the step that begins with sample `first`."""
        return first + (micro_batch * self._ranks + rank) * self._micro_batch_size

    def sample_ids(self, first: int, rank: int, micro_batch: int) -> list[tuple[str, int]]:
        """(name of the set, index in it) of each sample of a micro-batch of a data-parallel rank; first: as in `read`."""
        begin = self._begin(first, rank, micro_batch)
        return [self._order.sample_id(sample) for sample in range(begin, begin + self._micro_batch_size)]

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each set has been gone through after the first `samples` of the order, by the set's name."""
        return self._order.epochs(samples)


def validation_batches(
    dataset: IndexedDataset,
    seq_length: int,
    batch: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    *,
    multiple: int = 1,
    read: bool = True,
    extra_tokens: int = 1,
    most_windows: int | None = None,
) -> Iterator[tuple[Tokens, Tokens]]:
    """(inputs [b, s], targets [b, s + k - 1]) so that every token of the set but its first is scored once over all ranks.

    Of position t the next-token head predicts targets[:, t], and one that looks d tokens further ahead targets[:, t + d], for
    d < k = extra_tokens; it scores every token but the first d + 1 once. Windows of seq_length tokens follow each other without
    overlap; padding, and what lies beyond the set, has the target IGNORE_INDEX. most_windows: only the first so many, over all
    ranks together; None = all.

    At most `batch` windows at once on a rank; the last batch has as many as are left for each rank, and where that is one
    window for all ranks, it is as long as what it holds, rounded up to a `multiple` that divides seq_length. All ranks yield
    the same shapes; with read=False, for a rank that gets the values from another, their values are undefined.
    """
    num_scored = dataset.num_tokens - 1
    if most_windows is not None:
        num_scored = min(num_scored, most_windows * seq_length)
    num_windows = -(-num_scored // seq_length)
    for done in range(0, num_windows, batch * data_parallel_size):
        left = num_windows - done
        rows = min(batch, -(-left // data_parallel_size))
        length = seq_length
        if left == 1:
            length = min(seq_length, -(-(num_scored - done * seq_length) // multiple) * multiple)
        shape, target_shape = (rows, length), (rows, length + extra_tokens - 1)
        if not read:
            yield np.empty(shape, dtype=np.int64), np.empty(target_shape, dtype=np.int64)
            continue
        inputs = np.zeros(shape, dtype=np.int64)
        targets = np.full(target_shape, IGNORE_INDEX, dtype=np.int64)
        for row in range(rows):
            start = (done + data_parallel_rank * rows + row) * seq_length
            num_inputs = min(length, num_scored - start)
            if num_inputs > 0:
                sample = _sample(dataset, start, length + extra_tokens)
                inputs[row, :num_inputs], targets[row] = sample[:num_inputs], sample[1:]
        yield inputs, targets


def _sample(dataset: IndexedDataset, start: int, length: int) -> Tokens:
    """`length` tokens of the stream from `start` on, IGNORE_INDEX where it ends before."""
    tokens = dataset.tokens(start, min(length, dataset.num_tokens - start))
    return np.pad(tokens, (0, length - len(tokens)), constant_values=IGNORE_INDEX) if len(tokens) < length else tokens
