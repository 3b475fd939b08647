"""One gradient norm over dense parameters and table rows, whatever ZeRO stage DeepSpeed runs (contract C5).

DeepSpeed computes the dense norm inside its optimizers. It is patched there (optimizers.py), so that DeepSpeed's own clipping
uses the joint norm already. Because the norm needs the row gradients of all ranks, the patch is also the place where row
gradients are sent to the owners of the rows: once per step, on every rank, after the last backward pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from overtok_megatron.ngram.sharded_tables import RowGradients
from overtok_megatron.training.deepspeed.optimizers import OptimizerAdapter

ReduceRows = Callable[[], RowGradients | None]


@dataclass(frozen=True)
class StepNorms:
    """Gradient norms of a step before clipping, and what the update of rows needs.

    joint: of dense parameters and tables together. tables: of the tables alone. clip_factor: what gradients are multiplied
    by. row_gradients: reduced but not clipped; None without tables.
    """

    joint: float
    tables: float
    clip_factor: float
    row_gradients: RowGradients | None


class JointNorm:
    """Joins the norm of row gradients to DeepSpeed's dense norm.

    Order of calls in a step: `begin_step`, forward and backward and DeepSpeed's step, `finish_step`.
    """

    def __init__(self, adapter: OptimizerAdapter, device: torch.device) -> None:
        self._adapter = adapter
        self._reduce_rows: ReduceRows | None = None
        self._row_gradients: RowGradients | None = None
        self._square = torch.zeros(
            (), dtype=torch.float64, device=device
        )  # sum of squares of this step's row gradients
        adapter.join_norm(self._reduce_and_square)

    def begin_step(self, reduce_rows: ReduceRows) -> None:
        """Call this before the forward passes of a step.

        reduce_rows: sends row gradients to their owners, on all ranks together, or returns None without tables. It is called
        once, when DeepSpeed computes its norm.
        """
        self._reduce_rows, self._row_gradients = reduce_rows, None

    def finish_step(self) -> StepNorms:
        """Call this after DeepSpeed's step."""
        patched = self._reduce_rows is None
        joint_norm = self._adapter.global_norm()
        # A WAIT FOR THE DEVICE, but not for its update of the dense parameters (early_reads.py), where DeepSpeed has not read
        # the norm already: both norms are read at once, because whether to go on, and the factor of the rows' update, depend
        # on the joint one.
        if isinstance(joint_norm, Tensor):
            joint, squared = torch.stack([joint_norm.double(), self._reduce_and_square(joint_norm.device)]).tolist()
        else:
            joint, squared = joint_norm, self._reduce_and_square().item()
        # Where dense gradients are not finite, some of DeepSpeed's classes leave out the norm and the update; `joint` is then
        # not finite either. In any other step dense parameters would have been clipped without the rows, and updated.
        assert patched or not math.isfinite(joint), "DeepSpeed stepped without the patched norm"
        row_gradients, self._row_gradients = self._row_gradients, None
        return StepNorms(joint, math.sqrt(squared), self._adapter.clip_factor(joint), row_gradients)

    def _reduce_and_square(self, device: torch.device | None = None) -> Tensor:
        """Send row gradients to their owners, at the first call of a step; return their sum of squares over all ranks.

        DeepSpeed's patched norm calls this, on all ranks. Returns a float64 scalar, 0 without tables, on `device`; None = where
        it is.
        """
        if self._reduce_rows is not None:
            reduce_rows, self._reduce_rows = self._reduce_rows, None
            self._row_gradients = reduce_rows()  # THE EXCHANGE OF ROW GRADIENTS
            rows = self._row_gradients
            self._square = torch.zeros_like(self._square) if rows is None else rows.global_squared_norm
        if device is not None and device != self._square.device:
            # A WAIT FOR THE DEVICE, once per step: an offloaded optimizer clips on the CPU. The number stays there.
            self._square = self._square.to(device)
        return self._square
