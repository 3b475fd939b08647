"""One transformer layer: attention and a feed-forward, dense or of experts, each with its norm and its residual sum."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.attention import Attention, DecodeStep
from overtok_megatron.model.documents import document_mask
from overtok_megatron.model.mlp import SwiGLU
from overtok_megatron.model.moe import MixtureOfExperts, Routing
from overtok_megatron.model.norm import RMSNorm
from overtok_megatron.model.rotary import Rotary

Recompute = Literal["none", "selective", "full"]
NormPlacement = Literal["post", "pre"]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """num_experts of them, of which each token goes to `per_token`; the rest is explained in moe.py."""

    num_experts: int
    per_token: int
    normalize_weights: bool
    balance_weight: float
    z_weight: float


class Block(nn.Module):
    """x + attention_norm(attention(x)), then x + mlp_norm(mlp(x)); x is [b, s_shard, d]. That is norm_placement "post".

    "pre": x + attention(attention_norm(x)), then x + mlp(mlp_norm(x)), by the same names: Llama's input_layernorm is
    attention_norm, its post_attention_layernorm is mlp_norm.

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
        head_size: int,
        qk_norm: bool,
        window: int | None,
        norm_placement: NormPlacement,
        experts: Experts | None,
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
        self.norm_placement = norm_placement
        self.attention = Attention(
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_size=head_size,
            qk_norm=qk_norm,
            window=window,
            norm_epsilon=norm_epsilon,
            rotary=rotary,
            layer_index=layer_index,
            kernels=kernels,
            group=group,
            context_group=context_group,
            sequence_parallel=sequence_parallel,
            recompute_core=recompute == "selective",
        )
        self.mlp: SwiGLU | MixtureOfExperts
        if experts is None:
            self.mlp = SwiGLU(
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                kernels=kernels,
                group=group,
                sequence_parallel=sequence_parallel,
            )
        else:
            self.mlp = MixtureOfExperts(
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_experts=experts.num_experts,
                per_token=experts.per_token,
                normalize_weights=experts.normalize_weights,
                balance_weight=experts.balance_weight,
                z_weight=experts.z_weight,
                kernels=kernels,
                group=group,
                context_group=context_group,
                sequence_parallel=sequence_parallel,
            )
        sequence_group = group if sequence_parallel else None
        self.attention_norm = RMSNorm(hidden_size, eps=norm_epsilon, kernels=kernels, sum_group=sequence_group)
        self.mlp_norm = RMSNorm(hidden_size, eps=norm_epsilon, kernels=kernels, sum_group=sequence_group)

    def reset(self, seed: int, std: float) -> None:
        """Initial weights, the same for every layout: they depend on the seed and the layer's number only."""
        self.attention.reset(seed, f"blocks.{self.layer_index}.attention", std)
        self.mlp.reset(seed, f"blocks.{self.layer_index}.mlp", std)

    def forward(
        self, x: Tensor, decode: DecodeStep | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The layer's output, and with experts what the router reports.

        mask: as in `Attention`.
        """
        if self.recompute == "full" and torch.is_grad_enabled():
            out: tuple[Tensor, Routing | None]
            out = checkpoint(self._layer, x, decode, mask, use_reentrant=False, preserve_rng_state=False)
            return out
        return self._layer(x, decode, mask)

    def _layer(self, x: Tensor, decode: DecodeStep | None, mask: Tensor | None) -> tuple[Tensor, Routing | None]:
        if self.norm_placement == "pre":
            x = x + self.attention(self.attention_norm(x), decode, mask)
            out, routing = self._feed_forward(self.mlp_norm(x))
            return x + out, routing
        x = x + self.attention_norm(self.attention(x, decode, mask))
        out, routing = self._feed_forward(x)
        return x + self.mlp_norm(out), routing

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        out: tuple[Tensor, Routing | None] = (
            self.mlp(x) if isinstance(self.mlp, MixtureOfExperts) else (self.mlp(x), None)
        )
        return out


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, decode: DecodeStep | None = None, documents: Tensor | None = None
) -> tuple[Tensor, Routing | None]:
    """Run blocks one after the other: the last one's output, and with experts the sum of their routers' losses and the
    statistics of each, [blocks, F].

    documents [b, s] int64, of whole sequences: positions attend to those with the same number; None = to all. A decoding
    call has that in its masks.
    """
    total: Tensor | None = None
    stats: list[Tensor] = []
    masks: dict[int | None, Tensor] = {}  # made once for all layers of a window
    for block in blocks:
        assert isinstance(block, Block)
        window = block.attention.window
        if documents is not None and window not in masks:
            masks[window] = document_mask(documents, window, x.dtype)
        x, routing = block(x, decode, masks.get(window))
        if routing is not None:
            total = routing.loss if total is None else total + routing.loss
            stats.append(routing.stats)
    return x, None if total is None else Routing(total, torch.stack(stats))
