"""Optimizers that update just the rows that a step touched: cost follows tokens, never the size of the tables.

A row that a step does not touch keeps its value and its state: no momentum drift, no weight decay ("lazy", as
torch.optim.SparseAdam). Weight decay is decoupled (AdamW) and reaches touched rows only. States are allocated as zero
pages, so that memory of rows never touched is not resident on CPU.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from overtok_megatron.kernels.rows import RowKernels


class RowOptimizer(ABC):
    """Updates rows of `weight` [rows, width] float32 in place. `state` maps a name to its tensor, rows first."""

    def __init__(self, weight: Tensor, *, weight_decay: float) -> None:
        self.weight = weight
        self.weight_decay = weight_decay
        self.steps = 0
        self.state: dict[str, Tensor] = {}

    def update(self, rows: Tensor, grad: Tensor, learning_rate: float) -> None:
        """One step. rows [r] int64, distinct, local to `weight`; grad [r, width] float32, already clipped.

        Counts as a step (bias correction) also when r is 0, so that all ranks count alike.
        """
        self.steps += 1
        if rows.numel() > 0:
            self._advance(rows, grad, learning_rate, 1.0 - learning_rate * self.weight_decay)

    @abstractmethod
    def _advance(self, rows: Tensor, grad: Tensor, learning_rate: float, decay: float) -> None:
        """Multiply `rows` of the weight by `decay`, move them, and store their new state."""


class RowwiseAdagrad(RowOptimizer):
    """Adagrad with one accumulator a row: s_r += mean(g_r^2); row -= lr g_r / (sqrt(s_r) + eps)."""

    def __init__(
        self, weight: Tensor, *, weight_decay: float, eps: float, state_dtype: torch.dtype, kernels: RowKernels
    ) -> None:
        super().__init__(weight, weight_decay=weight_decay)
        self.eps = eps
        self.kernels = kernels
        self.state["square_sum"] = torch.zeros(weight.shape[0], dtype=state_dtype, device=weight.device)

    def _advance(self, rows: Tensor, grad: Tensor, learning_rate: float, decay: float) -> None:
        self.kernels.adagrad(self.weight, self.state["square_sum"], rows, grad, learning_rate, self.eps, decay)


class RowAdam(RowOptimizer):
    """Adam per element on touched rows; bias correction counts global steps (torch.optim.SparseAdam's rule)."""

    def __init__(
        self, weight: Tensor, *, weight_decay: float, betas: tuple[float, float], eps: float, state_dtype: torch.dtype
    ) -> None:
        super().__init__(weight, weight_decay=weight_decay)
        self.betas = betas
        self.eps = eps
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[name] = torch.zeros(weight.shape, dtype=state_dtype, device=weight.device)

    def _advance(self, rows: Tensor, grad: Tensor, learning_rate: float, decay: float) -> None:
        beta1, beta2 = self.betas
        mean_store, square_store = self.state["exp_avg"], self.state["exp_avg_sq"]
        mean = mean_store.index_select(0, rows).float().lerp_(grad, 1.0 - beta1)  # [r, w]
        square = square_store.index_select(0, rows).float().mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        mean_store.index_copy_(0, rows, mean.to(mean_store.dtype))
        square_store.index_copy_(0, rows, square.to(square_store.dtype))
        step_size = learning_rate * (1.0 - beta2**self.steps) ** 0.5 / (1.0 - beta1**self.steps)
        values = self.weight.index_select(0, rows)  # [r, w]
        values.mul_(decay).addcdiv_(mean, square.sqrt_().add_(self.eps), value=-step_size)
        self.weight.index_copy_(0, rows, values)


class RowSGD(RowOptimizer):
    """Plain gradient descent without state. Sees the scale of gradients, which the adaptive ones hide."""

    def _advance(self, rows: Tensor, grad: Tensor, learning_rate: float, decay: float) -> None:
        values = self.weight.index_select(0, rows).mul_(decay)
        self.weight.index_copy_(0, rows, values.add_(grad, alpha=-learning_rate))


def build_row_optimizer(
    name: str,
    weight: Tensor,
    *,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    state_dtype: torch.dtype,
    kernels: RowKernels | None = None,
) -> RowOptimizer:
    """The optimizer called `rowwise_adagrad`, `adam` or `sgd` over `weight` [rows, width]."""
    if name == "rowwise_adagrad":
        return RowwiseAdagrad(
            weight, weight_decay=weight_decay, eps=eps, state_dtype=state_dtype, kernels=kernels or RowKernels()
        )
    if name == "adam":
        return RowAdam(weight, weight_decay=weight_decay, betas=betas, eps=eps, state_dtype=state_dtype)
    assert name == "sgd", name
    return RowSGD(weight, weight_decay=weight_decay)
