"""From the order of samples to the arrays that a data-parallel rank trains and validates on.

Shapes: A micro-batches a step, b micro batch, s sequence.
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
        seq_length: int,
        micro_batch_size: int,
        accumulation_steps: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
    ) -> None:
        sets = [WeightedDataset(datasets, 1.0)] if isinstance(datasets, IndexedDataset) else datasets
        self._datasets = [one.dataset for one in sets]
        self._order = BlendOrder(sets, seq_length, seed)
        self._length = seq_length
        self._micro = micro_batch_size
        self._accumulation = accumulation_steps
        self._rank, self._ranks = data_parallel_rank, data_parallel_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what a step yields: [A, b, s + 1]."""
        return self._accumulation, self._micro, self._length + 1

    def read(self, first: int) -> Tokens:
        """This rank's samples of the step that begins with sample `first` of the order: [A, b, s + 1] int64."""
        result = np.empty(self.shape, dtype=np.int64)
        for micro_batch in range(self._accumulation):
            begin = first + (micro_batch * self._ranks + self._rank) * self._micro
            for row in range(self._micro):
                index, start = self._order.place(begin + row)
                result[micro_batch, row] = self._datasets[index].tokens(start, self._length + 1)
        return result

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
) -> Iterator[tuple[Tokens, Tokens]]:
    """(inputs, targets) [b, s] so that every token of the set but its first is scored once over all ranks.

    Windows of seq_length tokens follow each other without overlap; padding has the target -100. At most `batch` windows at
    once on a rank; the last batch has as many as are left for each rank, and where that is one window for all ranks, it is
    as long as what it holds, rounded up to a `multiple` that divides seq_length. All ranks yield the same shapes; with
    read=False, for a rank that gets the values from another, their values are undefined.
    """
    scored = dataset.num_tokens - 1
    windows = -(-scored // seq_length)
    for done in range(0, windows, batch * data_parallel_size):
        left = windows - done
        rows = min(batch, -(-left // data_parallel_size))
        length = seq_length
        if left == 1:
            length = min(seq_length, -(-(scored - done * seq_length) // multiple) * multiple)
        if not read:
            yield np.empty((rows, length), dtype=np.int64), np.empty((rows, length), dtype=np.int64)
            continue
        inputs = np.zeros((rows, length), dtype=np.int64)
        targets = np.full((rows, length), IGNORE_INDEX, dtype=np.int64)
        for row in range(rows):
            window = done + data_parallel_rank * rows + row
            count = min(seq_length, scored - window * seq_length)
            if count > 0:
                tokens = dataset.tokens(window * seq_length, count + 1)
                inputs[row, :count], targets[row, :count] = tokens[:-1], tokens[1:]
        yield inputs, targets
