"""Steps whose update was left out because the loss or the gradient was not finite (training.non_finite: skip).

They are counted, their samples are written to `skipped.jsonl` in the run's folder, and too many in a row stop the run.
"""

import json
import logging
from collections.abc import Callable

from overtok_megatron.errors import DivergedError
from overtok_megatron.files import write_atomically
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.run_folder import RunFolder, read_records

log = logging.getLogger(__name__)

SampleIds = Callable[[int, int, int], list[tuple[str, int]]]  # first sample of the step, data rank, micro-batch -> ids


class SkippedSteps:
    """Keeps account of skipped steps. All ranks must call `skipped` and `done` alike; the first one writes.

    limit: how many in a row stop the run. sample_ids: the (name of the set, index in it) of each sample of a micro-batch.
    """

    def __init__(
        self, run: RunFolder, grid: ProcessGrid, *, limit: int, num_micro_batches: int, sample_ids: SampleIds
    ) -> None:
        self._path = run.skipped
        self._grid = grid
        self._limit = limit
        self._num_micro_batches = num_micro_batches
        self._sample_ids = sample_ids
        self._in_a_row = 0
        self.count = 0  # of the whole run, on the first rank

    def resume(self, steps_done: int) -> None:
        """Count what was skipped up to the checkpoint from which the run goes on, and forget what came after it."""
        if self._grid.rank > 0 or not self._path.exists():
            return
        kept = [record for record in read_records(self._path) if record["step"] <= steps_done]
        write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self.count = len(kept)

    def done(self) -> None:
        """A step had its update."""
        self._in_a_row = 0

    def skipped(self, step: int, norm: float, consumed: int, own_micro_batches: list[int]) -> None:
        """The update of optimizer step `step` was left out. Raises DivergedError, on all ranks, at the limit.

        norm: the joint norm. consumed: samples before the step. own_micro_batches: those of this rank whose loss was not
        finite; where no rank has one, the loss was finite and the gradient was not, and nobody knows by which sample.
        """
        self._in_a_row += 1
        self.count += 1
        shape = self._grid.shape
        found = {
            (index, shape.coordinates(rank)["data"])
            for rank, own in enumerate(self._grid.gather_objects(own_micro_batches))
            for index in own
        }
        if self._grid.rank == 0:
            every = {(index, rank) for index in range(self._num_micro_batches) for rank in range(shape.data)}
            samples = [
                {"set": name, "index": sample}
                for index, rank in sorted(found or every)
                for name, sample in self._sample_ids(consumed, rank, index)
            ]
            record = {"step": step, "grad_norm": str(norm), "by": "loss" if found else "gradient", "samples": samples}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            log.warning(
                "step %d: the %s is not finite, its update is left out (%d in a row, %d in all); its samples: %s",
                step, record["by"], self._in_a_row, self.count, self._path,
            )  # fmt: skip
        if self._in_a_row >= self._limit:
            raise DivergedError(
                f"the gradient norm was not finite in {self._in_a_row} steps in a row, up to optimizer step {step} "
                f"(training.non_finite_limit): stopped; look at the samples in {self._path}, lower optimizer.learning_rate, or "
                "resume from the last checkpoint"
            )
