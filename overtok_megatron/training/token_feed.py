"""The tokens that ranks train and validate on: one rank of each copy of the model reads them and hands them to the others.

Shapes: A micro-batches per step, b micro batch, s sequence, k further tokens of the stream.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.batches import TrainBatches, validation_batches
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.run_data import RunData
from overtok_megatron.parallel.collectives import profiler_span
from overtok_megatron.parallel.grid import ProcessGrid


class TokenFeed:
    """Reads a run's data for one rank. All ranks of a copy of the model must ask for the same tokens in the same order."""

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        grid: ProcessGrid,
        device: torch.device,
        *,
        num_micro_batches: int,
        extra_tokens: int,
    ) -> None:
        """num_micro_batches: A. extra_tokens: k."""
        self._config = config
        self._grid = grid
        self._device = device
        self._reads = grid.batch_group is None or grid.rank == grid.batch_source
        self._batches = TrainBatches(
            data.train,
            seq_length=config.data.seq_length,
            micro_batch_size=config.training.micro_batch_size,
            num_micro_batches=num_micro_batches,
            data_parallel_rank=grid.data_rank,
            data_parallel_size=grid.shape.data,
            seed=config.data.shuffle_seed,
            extra_tokens=extra_tokens,
        )

    def steps(self, consumed: int, num_steps: int, announce: Callable[[Tensor], None]) -> Iterator[Tensor]:
        """The tokens [A, b, s + k] of each of `num_steps` steps, after the first `consumed` samples of the order.

        announce: called with the tokens of every step, in order, one step before they are given: the rows of a step can then
        be fetched while the step before it runs. Before the first step it gets the tokens of the first two.
        """

        def announced(step: int) -> Tensor:
            tokens = self._step_tokens(consumed + step * self._config.training.global_batch_size)
            announce(tokens)
            return tokens

        following = announced(0) if num_steps else None
        for step in range(num_steps):
            tokens, following = following, announced(step + 1) if step + 1 < num_steps else None
            assert tokens is not None
            yield tokens

    def epochs(self, consumed: int) -> dict[str, float]:
        """How often each set has been gone through after the first `consumed` samples, by the set's name."""
        return self._batches.epochs(consumed)

    def validation(self, dataset: IndexedDataset) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets) [b, s] int64 of a validation set, which score each of its tokens once over all ranks."""
        shape = self._grid.shape
        for pair in validation_batches(
            dataset,
            self._config.data.seq_length,
            self._config.training.micro_batch_size,
            self._grid.data_rank,
            shape.data,
            multiple=shape.context * shape.tensor,  # the ranks that divide a sequence among them
            read=self._reads,
        ):
            both = self._shared(torch.from_numpy(np.stack(pair)) if self._reads else None, (2, *pair[0].shape))
            yield both[0], both[1]

    def _step_tokens(self, consumed: int) -> Tensor:
        """The samples of the step after the first `consumed` samples: [A, b, s + k]."""
        own = torch.from_numpy(self._batches.read(consumed)) if self._reads else None
        return self._shared(own, self._batches.shape)

    def _shared(self, own: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """What one rank has read, int64 of `shape`, on all ranks of its copy of the model, which must all call this."""
        group = self._grid.batch_group
        tokens = torch.empty(shape, dtype=torch.int64, device=self._device) if own is None else own.to(self._device)
        if group is not None:
            with profiler_span("broadcast of tokens", group):
                dist.broadcast(tokens, src=self._grid.batch_source, group=group)
        return tokens
