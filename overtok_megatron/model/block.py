"""One transformer layer of OLMo2: the norms stand after attention and after the feed-forward, before the residual sum."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.attention import Attention, DecodeStep
from overtok_megatron.model.mlp import SwiGLU
from overtok_megatron.model.norm import RMSNorm
from overtok_megatron.model.rotary import Rotary

Recompute = Literal["none", "selective", "full"]


class Block(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)); x is [b, s_shard, d].

    recompute: what backward computes again instead of keeping it: nothing, the core of attention (from q, k and v), or
    all of the layer (from its input).
    """

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
        context_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.recompute = recompute
        self.attention = Attention(
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            norm_epsilon=norm_epsilon,
            rotary=rotary,
            layer_index=layer_index,
            kernels=kernels,
            group=group,
            context_group=context_group,
            sequence_parallel=sequence_parallel,
            recompute_core=recompute == "selective",
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
        if self.recompute == "full" and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._layer, x, decode, use_reentrant=False, preserve_rng_state=False)
            return out
        return self._layer(x, decode)

    def _layer(self, x: Tensor, decode: DecodeStep | None) -> Tensor:
        x = x + self.attention_norm(self.attention(x, decode))
        return x + self.mlp_norm(self.mlp(x))
