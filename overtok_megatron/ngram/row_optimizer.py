"""Optimizers that update only the rows that a step looked up: the cost follows tokens, never the size of the tables.

A row that a step did not look up keeps its value and its state: no momentum drift, no weight decay ("lazy", as in
torch.optim.SparseAdam). Weight decay is decoupled (AdamW) and reaches only the rows of the step. The rules themselves are in
kernels/rows.py (RowKernels.update); Adam's bias correction is here.
"""

import torch
from torch import Tensor

from overtok_megatron.config.counts import ROW_STATES
from overtok_megatron.config.schema import RowRule
from overtok_megatron.kernels.rows import RowKernels, RowStep, StoredRows, noise_key


class RowOptimizer:
    """Updates a rank's rows in place. `state` maps a name to its tensor, one entry per row; `steps` counts updates.

    rule: see RowStep. Adam's bias correction counts steps of the run, not of the row, as torch.optim.SparseAdam does.
    seed: keys the stochastic rounding of rows and states that are stored in fewer bits than float32.
    """

    def __init__(
        self,
        rule: RowRule,
        rows: StoredRows,
        *,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype,
        seed: int = 0,
        kernels: RowKernels | None = None,
    ) -> None:
        self.rule = rule
        self.rows = rows
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.seed = seed
        self.kernels = kernels or RowKernels()
        self.steps = 0
        count, width = rows.weight.shape
        self.state = {
            name: torch.zeros((count, width) if wide else count, dtype=state_dtype, device=rows.weight.device)
            for name, wide in ROW_STATES[rule].items()
        }

    def update(self, local_rows: Tensor, grad: Tensor, learning_rate: float, grad_factor: float = 1.0) -> None:
        """One step on local_rows [r] int64, distinct, with gradients grad [r, width] float32 times grad_factor.

        Counts as a step (bias correction) also where r is 0, so that all ranks count alike.
        """
        self.steps += 1
        if local_rows.numel() == 0:
            return
        rate = learning_rate
        if "exp_avg" in self.state:  # Adam's rules
            beta1, beta2 = self.betas
            rate *= (1.0 - beta2**self.steps) ** 0.5 / (1.0 - beta1**self.steps)
        step = RowStep(
            rule=self.rule,
            rate=rate,
            decay=1.0 - learning_rate * self.weight_decay,
            betas=self.betas,
            eps=self.eps,
            grad_factor=grad_factor,
            noise=noise_key(self.seed, self.steps),
        )
        self.kernels.update(self.rows, self.state, local_rows, grad, step)
