"""One transformer layer from its parts: attention and a feed-forward, each with its norm and its residual sum.

The parts come from the caller (assembly.py); nothing here knows their sizes, groups or kernels. Shapes: b batch, s_shard this
rank's positions (a slice of the sequence under context and under sequence parallelism), d hidden, F statistics of a router.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from overtok_megatron.kernels.compiled_layers import AfterCore, BeforeCore, CompiledLayers
from overtok_megatron.kernels.documents import Documents
from overtok_megatron.model.attention import Attention, DecodeStep
from overtok_megatron.model.feed_forward import FeedForward, Routing
from overtok_megatron.model.mlp import SwiGLU
from overtok_megatron.model.norm import RMSNorm, RMSNormAdded, RMSNormOfSum


class Block(nn.Module):
    """[b, s_shard, d] -> [b, s_shard, d].

    Post-norm, with two `RMSNormAdded`: x + norm(attention(x)), then x + norm(feed_forward(x)). Pre-norm, with an `RMSNorm` and
    an `RMSNormOfSum`: x + attention(norm(x)), then x + feed_forward(norm(x)). Either way attention_norm is the norm of
    attention: Llama's input_layernorm is attention_norm, and its post_attention_layernorm is feed_forward_norm.

    recompute: backward computes the layer again from its input, instead of keeping activations. halves: training runs the
    layer in compiled halves, which read weights without calling the modules that hold them; its feed-forward is a SwiGLU, and
    no tensor group splits it.
    """

    def __init__(
        self,
        *,
        attention: Attention,
        feed_forward: FeedForward,
        attention_norm: RMSNorm | RMSNormAdded,
        feed_forward_norm: RMSNormOfSum | RMSNormAdded,
        recompute: bool = False,
        halves: CompiledLayers | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.halves = halves
        # The names and the order of these four are those of parameters in checkpoints (the order by way of the optimizer).
        self.attention = attention
        self.mlp = feed_forward
        self.attention_norm = attention_norm
        self.mlp_norm = feed_forward_norm

    def reset(self, seed: int, name: str, std: float) -> None:
        """Draw initial weights, which depend on (seed, name) and not on the layout."""
        self.attention.reset(seed, f"{name}.attention", std)
        self.mlp.reset(seed, f"{name}.mlp", std)

    def forward(
        self, x: Tensor, decode: DecodeStep | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The layer's output, and what its router reports (None if dense). documents: as in `Attention`."""
        if self.recompute and torch.is_grad_enabled():
            out: tuple[Tensor, Routing | None]
            out = checkpoint(self._layer, x, decode, documents, use_reentrant=False, preserve_rng_state=False)
            return out
        return self._layer(x, decode, documents)

    def _layer(
        self, x: Tensor, decode: DecodeStep | None, documents: Documents | None
    ) -> tuple[Tensor, Routing | None]:
        if self.halves is not None and decode is None and torch.is_grad_enabled():
            return self._in_halves(self.halves, x, documents), None
        if isinstance(self.mlp_norm, RMSNormOfSum):
            x, normed = self.mlp_norm(x, self.attention(self.attention_norm(x), decode, documents))
            out, routing = self.mlp(normed)
            return x + out, routing
        x = self.attention_norm(x, self.attention(x, decode, documents))
        out, routing = self.mlp(x)
        return self.mlp_norm(x, out), routing

    def _in_halves(self, halves: CompiledLayers, x: Tensor, documents: Documents | None) -> Tensor:
        attention, mlp, norm = self.attention, self.mlp, self.attention_norm.weight
        assert isinstance(mlp, SwiGLU)
        pre = isinstance(self.mlp_norm, RMSNormOfSum)
        q_norm, k_norm = attention.q_norm, attention.k_norm
        q_proj, k_proj, v_proj = attention.qkv.weights
        before = BeforeCore(
            q_proj=q_proj,
            k_proj=k_proj,
            v_proj=v_proj,
            norm=norm if pre else None,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
        )
        q, k, v = halves.before_core(x, *attention.angles(x.shape[1], x.device), before, self.mlp_norm.eps)
        mixed = attention.core(q, k, v, documents)
        gate_proj, up_proj = mlp.gate_up.weights
        after = AfterCore(
            o_proj=attention.o_proj.weight,
            gate_proj=gate_proj,
            up_proj=up_proj,
            down_proj=mlp.down_proj.weight,
            attention_norm=None if pre else norm,
            mlp_norm=self.mlp_norm.weight,
        )
        return halves.after_core(x, mixed, after, self.mlp_norm.eps)


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, decode: DecodeStep | None = None, documents: Documents | None = None
) -> tuple[Tensor, Routing | None]:
    """Run blocks one after the other.

    Returns the output of the last one; and with experts the sum of the routers' losses and the statistics of each router,
    [blocks, F]. documents: as in `Attention`; a decoding call has its documents in its masks already.
    """
    total: Tensor | None = None
    stats: list[Tensor] = []
    for block in blocks:
        assert isinstance(block, Block)
        x, routing = block(x, decode, documents)
        if routing is not None:
            total = routing.loss if total is None else total + routing.loss
            stats.append(routing.stats)
    return x, None if total is None else Routing(total, torch.stack(stats))
