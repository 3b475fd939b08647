"""The dense feed-forward layer, SwiGLU: down(silu(gate(x)) * up(x)).

Shapes: b batch, s_shard this rank's positions (a slice of the sequence under context and under sequence parallelism), d hidden.
"""

import torch.distributed as dist
from torch import Tensor

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.feed_forward import FeedForward
from overtok_megatron.parallel.linear import MergedColumnParallelLinear, RowParallelLinear


class SwiGLU(FeedForward):
    """[b, s_shard, d] -> [b, s_shard, d]; gate and up are split by columns, down by rows, over the tensor-parallel group."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        kernels: Kernels,
        tensor_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = MergedColumnParallelLinear(
            hidden_size,
            {"gate_proj": intermediate_size, "up_proj": intermediate_size},
            group=tensor_group,
            sequence_parallel=sequence_parallel,
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, group=tensor_group, sequence_parallel=sequence_parallel
        )

    def reset(self, seed: int, name: str, std: float) -> None:
        self.gate_up.reset(seed, f"{name}.gate_up", std)
        self.down_proj.reset(seed, f"{name}.down_proj", std)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        out: Tensor = self.down_proj(self.kernels.swiglu(self.gate_up(x)))
        return out, None
