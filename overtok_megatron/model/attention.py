"""Causal self-attention with grouped queries and rotary positions, with RMSNorm over q and k or without, and without biases.

A position sees all positions before it, or the last few of them (a sliding window); of all documents, or of its own only
where the caller passes the documents (kernels/documents.py).

Shapes: b batch, s this context rank's slice of the sequence (all of it without context parallelism), s_shard the part of s that
a tensor-parallel rank holds under sequence parallelism (else s), d hidden, e head size, c columns of the decoding cache. Of all
query heads and key/value heads, h_shard and g_shard are those of this tensor-parallel rank. Under context parallelism an
all-to-all before and after the core exchanges the slice of the sequence for a slice of these heads (DeepSpeed-Ulysses, arXiv
2309.14509).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.kernels.documents import Documents
from overtok_megatron.model.cache import KVCache
from overtok_megatron.model.norm import RotatedRMSNorm
from overtok_megatron.model.rotary import Rotary
from overtok_megatron.parallel.collectives import exchange_dims, group_rank, group_size
from overtok_megatron.parallel.linear import MergedColumnParallelLinear, RowParallelLinear


@dataclass(kw_only=True)
class DecodeStep:
    """What one decoding call knows beyond its hidden states.

    positions [b, s] int64 of the new tokens in their sequences; mask [b, 1, s, c] bool, which columns of the cache each of
    them sees, and the same for layers with a sliding window.
    """

    positions: Tensor
    mask: Tensor
    sliding_mask: Tensor
    cache: KVCache


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The sizes of an attention layer, the same for all layers of a model.

    qk_norm_epsilon: epsilon of the RMSNorm over all heads of q, and of that over all heads of k; None = no such norms.
    """

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    qk_norm_epsilon: float | None


class Attention(nn.Module):
    """[b, s_shard, d] -> [b, s_shard, d], summed over the tensor group already.

    window: how many positions each position sees, its own included; None = all before it. layer_index: which entry of a
    decoding cache is this layer's. recompute_core: backward computes the product of attention again, from q, k and v.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        window: int | None,
        rotary: Rotary,
        layer_index: int,
        kernels: Kernels,
        tensor_group: dist.ProcessGroup | None = None,
        context_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
        recompute_core: bool = False,
    ) -> None:
        super().__init__()
        self.context_group = context_group
        self.recompute_core = recompute_core
        self.head_size = shape.head_size
        self.window = window
        ranks = group_size(tensor_group)
        assert shape.num_heads % ranks == 0 and shape.num_key_value_heads % ranks == 0
        self.heads_shard = shape.num_heads // ranks
        self.kv_heads_shard = shape.num_key_value_heads // ranks
        self.rotary = rotary
        self.kernels = kernels
        self.layer_index = layer_index
        query_size, kv_size = shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size
        self.qkv = MergedColumnParallelLinear(
            shape.hidden_size,
            {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size},
            group=tensor_group,
            sequence_parallel=sequence_parallel,
        )
        self.q_norm = self.k_norm = None
        if (eps := shape.qk_norm_epsilon) is not None:
            self.q_norm = RotatedRMSNorm(query_size, eps=eps, kernels=kernels, group=tensor_group)
            self.k_norm = RotatedRMSNorm(kv_size, eps=eps, kernels=kernels, group=tensor_group)
        self.o_proj = RowParallelLinear(
            query_size, shape.hidden_size, group=tensor_group, sequence_parallel=sequence_parallel
        )

    def reset(self, seed: int, name: str, std: float) -> None:
        self.qkv.reset(seed, f"{name}.qkv", std)
        self.o_proj.reset(seed, f"{name}.o_proj", std)

    def forward(self, x: Tensor, decode: DecodeStep | None = None, documents: Documents | None = None) -> Tensor:
        """x [b, s_shard, d] -> [b, s_shard, d]. documents: of the positions of all context ranks; None = one document."""
        q, k, v = self.qkv(x).split(self.qkv.sizes, dim=-1)
        batch, length = q.shape[:2]  # length is s: `qkv` has gathered what sequence parallelism splits
        v = v.reshape(batch, length, self.kv_heads_shard, self.head_size).transpose(1, 2)  # [b, g_shard, s, e]
        angles = self.angles(length, x.device) if decode is None else self.rotary.angles(decode.positions)
        q, k = (
            (self.q_norm or self._rotate)(q, *angles).transpose(1, 2),  # [b, h_shard, s, e]
            (self.k_norm or self._rotate)(k, *angles).transpose(1, 2),  # [b, g_shard, s, e]
        )
        if decode is not None:
            k, v = decode.cache.write(self.layer_index, k, v)
            seen = decode.mask if self.window is None else decode.sliding_mask
            mixed = _attend_to_cache(q, k, v, seen)
        else:
            mixed = self.core(q, k, v, documents)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out

    def angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [s, 1, e/2] float32 of the positions of this context rank's slice; `length` is s."""
        return self.rotary.range_angles(group_rank(self.context_group) * length, length, device)

    def core(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """q [b, h_shard, s, e], k and v [b, g_shard, s, e] -> [b, h_shard, s, e], over the positions of all context ranks."""
        if self.recompute_core and torch.is_grad_enabled():
            mixed: Tensor = checkpoint(self._mix, q, k, v, documents, use_reentrant=False, preserve_rng_state=False)
            return mixed
        return self._mix(q, k, v, documents)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys [b, s, h_shard e] of a model without norms over them -> [b, s, h_shard, e]."""
        return self.kernels.rotate(x.unflatten(-1, (-1, self.head_size)), cos, sin)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        q, k, v = (exchange_dims(x, self.context_group, split=1, join=2) for x in (q, k, v))
        mixed = self.kernels.causal_attention(q, k, v, self.window, documents)
        return exchange_dims(mixed, self.context_group, split=2, join=1)


def _attend_to_cache(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [b, h_shard, s, e], k and v [b, g_shard, c, e], mask bool [b, 1, s, c] -> [b, h_shard, s, e].

    The query heads that share keys and values are taken as further query rows, so that no copy of the cache is made: torch's
    kernels with a mask know no shared heads on CUDA.
    """
    batch, heads, length, size = q.shape
    kv_heads = k.shape[1]
    shared = heads // kv_heads
    rows = q.reshape(batch, kv_heads, shared * length, size)
    mixed = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.repeat(1, 1, shared, 1))
    return mixed.reshape(batch, heads, length, size)
