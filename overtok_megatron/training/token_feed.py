"""The tokens that ranks train and validate on: one rank of each copy of the model reads them and hands them to the others.

Both happen on a thread, one step ahead of the step that is announced, so that no training step waits for the disk. The thread
puts the tokens into host memory, pinned beside a GPU; the main thread only starts their copy to the device.

Shapes: A micro-batches per step, b micro batch, s sequence, k further tokens of the stream.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import repeat

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.data.batches import Tokens, TrainBatches, validation_batches
from overtok_megatron.data.indexed import IndexedDataset
from overtok_megatron.data.run_data import RunData
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.parallel.spans import profiler_span
from overtok_megatron.parallel.uploading import moved
from overtok_megatron.parallel.worker import Worker

Read = Callable[[], Tokens | None]  # the next tokens of some order, of the same shape on every rank; None at its end


class TokenFeed:
    """Reads a run's data for one rank. All ranks of a copy of the model must ask for the same tokens in the same order.

    What the thread raises is raised where the tokens are asked for, on the rank that reads. Call `finish` at the end.
    """

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
        # The main thread gives it jobs at the same points of the program on every rank: the broadcasts come in one order, and
        # every rank makes as many of them, whenever training stops. After a failed read it broadcasts nothing more, because
        # other ranks would take the next broadcast for the missing one.
        self._worker = Worker("tokens", device)

    def steps(self, consumed: int, num_steps: int, announce: Callable[[Tensor], None]) -> Iterator[Tensor]:
        """The tokens [A, b, s + k] of each of `num_steps` steps on the device, after the first `consumed` samples of the order.

        announce: called with the tokens of every step IN HOST MEMORY, in order, one step before they are given: the exchange
        of a step's rows can then be prepared while the step before it runs. Before the first step it gets the tokens of the
        first two.
        """
        batch = self._config.training.global_batch_size
        reading = self._read_ahead(partial(self._step_tokens, consumed + step * batch) for step in range(num_steps))

        def announced() -> Tensor | None:
            host = next(reading, None)
            if host is not None:
                announce(host)
            return host

        following = announced()
        while following is not None:
            tokens, following = following, announced()
            yield moved(tokens, self._device)

    def epochs(self, consumed: int) -> dict[str, float]:
        """How often each set has been gone through after the first `consumed` samples, by the set's name."""
        return self._batches.epochs(consumed)

    def sample_ids(self, consumed: int, data_rank: int, micro_batch: int) -> list[tuple[str, int]]:
        """(name of the set, index in it) of the samples of a micro-batch, in the step after the first `consumed` samples."""
        return self._batches.sample_ids(consumed, data_rank, micro_batch)

    def validation(self, dataset: IndexedDataset) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets) [b, s] int64 of a validation set, which score each of its tokens once over all ranks.

        With training.validation_batches they are the tokens of its first samples.
        """
        shape, training = self._grid.shape, self._config.training
        batches = validation_batches(
            dataset,
            self._config.data.seq_length,
            training.micro_batch_size,
            self._grid.data_rank,
            shape.data,
            multiple=shape.context * shape.tensor,  # the ranks that divide a sequence among them
            read=self._reads,
            most_windows=training.validation_batches and training.validation_batches * training.global_batch_size,
        )

        def read() -> Tokens | None:
            pair = next(batches, None)
            return None if pair is None else np.stack(pair)

        for host in self._read_ahead(repeat(read)):
            if host is None:
                break
            both = moved(host, self._device)
            yield both[0], both[1]

    def finish(self) -> None:
        """Return when the thread has done what it was asked for; all ranks must call this at the end of a run."""
        self._worker.wait()

    def _step_tokens(self, consumed: int) -> Tokens:
        """The samples of the step after the first `consumed` samples: [A, b, s + k], undefined where it does not read."""
        return self._batches.read(consumed) if self._reads else np.empty(self._batches.shape, dtype=np.int64)

    def _read_ahead(self, reads: Iterable[Read]) -> Iterator[Tensor | None]:
        """What `_hand_out` returns for each of `reads`; the thread begins with the next one before one is given."""
        following: Future[Tensor | None] | None = None
        for read in reads:
            current, following = following, self._worker.submit(partial(self._hand_out, read))
            if current is not None:
                yield self._worker.result(current)
        if following is not None:
            yield self._worker.result(following)

    def _hand_out(self, read: Read) -> Tensor | None:
        """On the thread: what one rank reads, in the host memory of all ranks of its copy of the model; None at the end."""
        own = read()
        if own is None:
            return None
        host = torch.from_numpy(own)
        if self._device.type == "cuda":
            host = host.pin_memory()
        group = self._grid.batch_group
        if group is not None:
            with profiler_span("broadcast of tokens", group):
                dist.broadcast(host, src=self._grid.batch_source, group=group)
        return host
