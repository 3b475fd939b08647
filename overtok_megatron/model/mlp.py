"""The SwiGLU feed-forward layer: down(silu(gate(x)) * up(x)). Shapes: b, s, d hidden, f_shard this rank's intermediate."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.parallel.linear import ColumnParallelLinears, RowParallelLinear


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping only its inputs; the silu is recomputed in backward (cheaper than storing it)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # torch: *Any
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


class SwiGLU(nn.Module):
    """[b, s, d] -> [b, s, d]; gate and up are split by columns, down by rows, over the tensor-parallel group."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinears(
            hidden_size,
            {"gate_proj": intermediate_size, "up_proj": intermediate_size},
            group=group,
            sequence_parallel=sequence_parallel,
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, group=group, sequence_parallel=sequence_parallel
        )

    def reset(self, seed: int, name: str, std: float) -> None:
        self.gate_up.reset(seed, f"{name}.gate_up", std)
        self.down_proj.reset(seed, f"{name}.down_proj", std)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        out: Tensor = self.down_proj(_SwiGLU.apply(gate, up))
        return out
