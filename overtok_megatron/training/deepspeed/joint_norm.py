"""One gradient norm over dense parameters and table rows, whatever ZeRO stage DeepSpeed runs (contract C5).

DeepSpeed computes the dense norm inside its optimizers, each in its own place; the tables' part is slipped in there, so
that its own clipping already uses the joint norm. Where it comes in:

| precision, ZeRO stage | DeepSpeed's class | method wrapped |
| any, 1 and 2 (with bf16 only 2) | DeepSpeedZeroOptimizer | scaled_global_norm |
| any, 3 | DeepSpeedZeroOptimizer_Stage3 | _get_norm_groups |
| bf16, 1 | BF16_Optimizer | get_grads_for_norm |
| bf16, 0 | FP16_UnfusedOptimizer, FP16_Optimizer | unscale_and_clip_grads |
| fp32, 0 | none, the torch optimizer itself | a hook before its step, which clips here |

Every hook runs once a step on every rank after the last backward, so the gradient exchange can sit in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.ngram.sharded_tables import RowGradients
from overtok_megatron.parallel.collectives import named
from overtok_megatron.parallel.grid import ProcessGrid
from overtok_megatron.parallel.splits import is_pipeline_replica, splits_of


@dataclass(frozen=True)
class StepNorms:
    """Gradient norms of a step before clipping, over dense parameters and tables together and of the tables alone; the factor
    that clips; and the reduced row gradients, which are not clipped yet (None without tables)."""

    joint: float
    tables: float
    clip_factor: float
    rows: RowGradients | None


class JointNorm:
    """Joins the tables' squared norm to DeepSpeed's dense norm. max_norm: 0 = measure but do not clip."""

    def __init__(self, engine: Any, grid: ProcessGrid, max_norm: float) -> None:
        self.engine = engine
        self.grid = grid
        self.max_norm = max_norm
        self._reduce_rows: Callable[[], RowGradients | None] | None = None
        self._rows: RowGradients | None = None
        self._own_norm: float | None = None
        self._install()

    def _clip_before_step(self, *_: Any) -> None:
        """For float32 without ZeRO, where nobody else does it: the joint norm, and the clipping of dense gradients."""
        dense = self._dense_square()
        self._own_norm = math.sqrt(dense + float(self._tables()))
        factor = self._factor(self._own_norm)
        if factor != 1.0:
            for parameter in self._parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def begin_step(self, reduce_rows: Callable[[], RowGradients | None]) -> None:
        """Before the forward passes of a step. reduce_rows: sends row gradients to their owners, all ranks together; it is
        called once, after the last backward pass, when DeepSpeed computes its norm. None = there are no tables."""
        self._reduce_rows, self._rows, self._own_norm = reduce_rows, None, None

    def finish_step(self) -> StepNorms:
        """After DeepSpeed's step."""
        square = float(self._tables())
        norm = self._own_norm if self._clips_itself else self.engine.get_global_grad_norm()
        assert norm is not None
        rows, self._rows = self._rows, None
        return StepNorms(float(norm), math.sqrt(square), self._factor(float(norm)), rows)

    def _factor(self, norm: float) -> float:
        return self.max_norm / (norm + 1e-6) if 0 < self.max_norm < norm + 1e-6 else 1.0

    def _tables(self) -> Tensor:
        """The tables' sum of squared gradients, float64 scalar. The first call of a step sends the row gradients out."""
        if self._reduce_rows is not None:
            self._rows, self._reduce_rows = self._reduce_rows(), None
        return (
            torch.zeros((), dtype=torch.float64, device=self.engine.device) if self._rows is None else self._rows.square
        )

    def _install(self) -> None:
        optimizer = self.engine.optimizer
        kind = type(optimizer).__name__
        self._clips_itself = isinstance(optimizer, torch.optim.Optimizer)
        if self._clips_itself:
            self._parameters = lambda: self.engine.module.parameters()
            self.engine.clip_fp32_gradients = lambda: None  # DeepSpeed's knows the dense gradients only
            optimizer.register_step_pre_hook(self._clip_before_step)
        elif kind == "DeepSpeedZeroOptimizer_Stage3":
            self._wrap_norm_groups(optimizer)
        elif kind == "DeepSpeedZeroOptimizer":
            norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda *args, **kwargs: self._join(norm(*args, **kwargs))
        elif kind == "BF16_Optimizer":
            self._wrap_gradient_list(optimizer)
        else:
            assert kind in ("FP16_UnfusedOptimizer", "FP16_Optimizer"), f"unknown DeepSpeed optimizer {kind}"
            self._wrap_unscale(optimizer, position=0 if kind == "FP16_UnfusedOptimizer" else 1)

    def _wrap_norm_groups(self, optimizer: Any) -> None:
        """Add the tables' norm as one more group, on the device of the others: the CPU with an offloaded optimizer."""
        original = optimizer._get_norm_groups

        def norms() -> list[Any]:
            dense, own = original(), self._tables().sqrt().float()
            return [*dense, own.to(dense[0].device) if dense and isinstance(dense[0], Tensor) else own]

        optimizer._get_norm_groups = norms

    def _join(self, dense: Tensor) -> Tensor:
        joint: Tensor = (dense.double().square() + self._tables().to(dense.device)).sqrt().to(dense.dtype)
        return joint

    def _wrap_gradient_list(self, optimizer: Any) -> None:
        """The tables' norm joins as one more tensor; DeepSpeed sums over the ranks of a model, so on the first only."""
        original = optimizer.get_grads_for_norm

        def gradients(for_clipping: bool = False) -> Any:
            if for_clipping:
                return original(for_clipping=True)
            dense, experts = original()
            square = self._tables()
            first = self.grid.tensor_rank == 0 and self.grid.is_first_stage
            return ([*dense, square.sqrt().float().reshape(1)] if first else dense), experts

        optimizer.get_grads_for_norm = gradients

    def _wrap_unscale(self, optimizer: Any, position: int) -> None:
        original = optimizer.unscale_and_clip_grads

        def unscale(*args: Any, **kwargs: Any) -> Any:
            values = list(args)
            values[position] = (float(values[position]) ** 2 + float(self._tables())) ** 0.5
            optimizer._global_grad_norm = values[position]
            return original(*values, **kwargs)

        optimizer.unscale_and_clip_grads = unscale

    def _dense_square(self) -> float:
        """Sum of squares of dense gradients over the ranks of a model, each value once.

        A shard counts on every tensor-parallel rank, a replica on the first; the second copy of a tied weight does not.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for parameter in self._parameters():
            counts = self.grid.tensor_rank == 0 or bool(splits_of(parameter))
            if parameter.grad is not None and counts and not is_pipeline_replica(parameter):
                total += parameter.grad.double().square().sum()
        if self.grid.replica_group is not None:
            with named("all-reduce of squares", self.grid.replica_group):
                dist.all_reduce(total, group=self.grid.replica_group)
        return float(total)
