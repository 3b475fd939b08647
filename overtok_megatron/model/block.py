"""One transformer layer of OLMo2: the norms stand after attention and after the feed-forward, before the residual sum."""

import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.attention import Attention, DecodeStep
from overtok_megatron.model.mlp import SwiGLU
from overtok_megatron.model.norm import RMSNorm
from overtok_megatron.model.rotary import Rotary


class Block(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)); x is [b, s_shard, d]."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        norm_epsilon: float,
        rotary: Rotary,
        layer_index: int,
        kernels: Kernels,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.attention = Attention(
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            norm_epsilon=norm_epsilon,
            rotary=rotary,
            layer_index=layer_index,
            kernels=kernels,
            group=group,
            sequence_parallel=sequence_parallel,
        )
        self.mlp = SwiGLU(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            kernels=kernels,
            group=group,
            sequence_parallel=sequence_parallel,
        )
        positions_split = group if sequence_parallel else None
        self.attention_norm = RMSNorm(hidden_size, eps=norm_epsilon, kernels=kernels, sum_group=positions_split)
        self.mlp_norm = RMSNorm(hidden_size, eps=norm_epsilon, kernels=kernels, sum_group=positions_split)

    def reset(self, seed: int, std: float) -> None:
        """Initial weights, the same for every layout: they depend on the seed and the layer's number only."""
        self.attention.reset(seed, f"blocks.{self.layer_index}.attention", std)
        self.mlp.reset(seed, f"blocks.{self.layer_index}.mlp", std)

    def forward(self, x: Tensor, decode: DecodeStep | None = None) -> Tensor:
        x = x + self.attention_norm(self.attention(x, decode))
        return x + self.mlp_norm(self.mlp(x))
