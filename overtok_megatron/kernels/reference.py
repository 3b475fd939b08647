"""Passes over activations in torch's own operators: they run on any device, and tests compare the other forms with them.

Passes over table rows are in rows.py. Shapes: .. any leading dimensions, d normalised size, f feed-forward size, b batch,
s sequence, h query heads, g key/value heads, e head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.kernels.documents import Documents

SumInPlace = Callable[[Tensor], None]  # sums a tensor over the ranks that split a dimension, in place
Norm = Callable[[Tensor, Tensor, float], Tensor]
Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]


class _RMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps); where d is split over ranks, forward and backward sum over them what they sum over d.

    | | x, y | sum of squares | dx |
    | shard | [.., d_shard] | over ranks | needs sum(dy w x) over d: over ranks |
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, full_size: int, sum_over_ranks: SumInPlace | None
    ) -> Tensor:
        square_sum = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()  # [.., 1]
        if sum_over_ranks is not None:
            sum_over_ranks(square_sum)
        scale = square_sum.div_(full_size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.full_size, ctx.sum_over_ranks = full_size, sum_over_ranks
        return torch.mul(x, scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = torch.mul(x, scale)  # float32 [.., d_shard]
        grad_weight = torch.mul(normed, grad).flatten(0, -2).sum(0)
        scaled = torch.mul(grad, weight.float())
        dot = torch.linalg.vecdot(scaled, normed).unsqueeze(-1)  # [.., 1]
        if ctx.sum_over_ranks is not None:
            ctx.sum_over_ranks(dot)
        normed.mul_(dot.div_(-ctx.full_size)).add_(scaled).mul_(scale)
        return normed.to(x.dtype), grad_weight.to(weight.dtype), None, None, None


def rms_norm_split(x: Tensor, weight: Tensor, eps: float, full_size: int, sum_over_ranks: SumInPlace | None) -> Tensor:
    """RMSNorm of [.., d_shard], this rank's part of d = `full_size`. sum_over_ranks: None = d is not split."""
    result: Tensor = _RMSNorm.apply(x, weight, eps, full_size, sum_over_ranks)
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x^2) + eps) over the last axis, float32 inside, x's dtype out."""
    return rms_norm_split(x, weight, eps, x.shape[-1], None)


def swiglu(gate_up: Tensor) -> Tensor:
    """[.., 2 f], the gate first -> silu(gate) * up [.., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, s, h, e]; cos, sin [(b,) s, 1, e/2] float32. Pairs are (i, i + e/2), Llama's and OLMo2's form."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def add_normed(x: Tensor, branch: Tensor, weight: Tensor, eps: float, *, norm: Norm = rms_norm) -> Tensor:
    """x + norm(branch), the residual sum of a post-norm layer; all [.., d] of one dtype."""
    return x + norm(branch, weight, eps)


def norm_of_sum(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, *, norm: Norm = rms_norm
) -> tuple[Tensor, Tensor]:
    """(x + branch, its norm), the residual sum of a pre-norm layer and what the next layer reads; all [.., d] of one dtype."""
    total = x + branch
    return total, norm(total, weight, eps)


def norm_and_rotate(
    x: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    full_size: int,
    sum_over_ranks: SumInPlace | None,
    *,
    norm: Norm = rms_norm,
    rotation: Rotation = rotate,
) -> Tensor:
    """x [b, s, h e], normalised over its last axis and then rotated: [b, s, h, e]. cos, sin: as in `rotate`.

    full_size, sum_over_ranks: as in `rms_norm_split`, where the heads are split over ranks. norm: used where they are not.
    """
    normed = (
        norm(x, weight, eps) if sum_over_ranks is None else rms_norm_split(x, weight, eps, full_size, sum_over_ranks)
    )
    return rotation(normed.unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Documents | None = None
) -> Tensor:
    """q [b, h, s, e], k and v [b, g, s, e] -> [b, h, s, e]; h / g query heads share each key/value head.

    Position t sees positions 0..t, or the last `window` of these. documents: it sees those of its own document only.
    """
    length = q.shape[2]
    if documents is not None:
        return _attention(q, k, v, documents.derive(document_mask, window, q.dtype))
    if window is None or window >= length:
        return _attention(q, k, v, None)
    step = max(window, 256)  # queries per tile; their keys start less than a window before them
    parts = []
    for start in range(0, length, step):
        stop, first = min(start + step, length), max(0, start - window + 1)
        mask = window_mask(stop - start, stop - first, window, q.device)
        parts.append(_attention(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], mask))
    return torch.cat(parts, dim=2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention with shared keys and values. mask: None = causal.

    torch's flash kernels read shared heads in place: on a CPU always, on CUDA in 16 bits and without a mask. Elsewhere on CUDA
    torch would leave its memory-efficient kernel, which does not know shared heads, and keep all scores: a copy is cheaper.
    Source: ATen/native/transformers/cuda/sdp_utils.cpp, check_batch_size_and_num_heads_dense.
    """
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and q.device.type != "cpu" and (mask is not None or q.element_size() > 2):
        k, v, shared = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared > 1)


def document_mask(ids: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """ids [b, s] int64, the document of each position -> [b, 1, s, s] of `dtype`, to be added to attention scores.

    0 where a position sees another one of its own document, else -inf. window: how many positions each sees, its own
    included; None = all before it. The mask is not boolean, because torch would convert a boolean mask in every layer and
    keep each layer's result until backward.
    """
    length = ids.shape[1]
    hidden = ids.unsqueeze(2) != ids.unsqueeze(1)  # [b, s, s]
    hidden |= ~window_mask(length, length, length if window is None else window, ids.device)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -torch.inf).unsqueeze(1)


def window_mask(queries: int, seen: int, window: int, device: torch.device) -> Tensor:
    """[queries, seen] bool: whether a query sees a key, which is itself or one of the `window` - 1 keys before it.

    The queries are at the positions of the last keys.
    """
    causal = torch.ones(queries, seen, dtype=torch.bool, device=device).tril_(seen - queries)
    return causal.triu_(seen - queries - window + 1)


def softmax_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [c, v] -> their maximum [c] and the sum of exp(logit - maximum) [c], float32; v may be 0."""
    if logits.shape[1] == 0:
        empty = torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
        return empty - torch.inf, empty
    wide = logits.float()
    largest = wide.amax(dim=1)
    return largest, (wide - largest.unsqueeze(1)).exp_().sum(dim=1)


def target_logits(logits: Tensor, target: Tensor) -> Tensor:
    """logits [c, v], target [c] int64 -> the logit of each row's target [c] float32; -inf where no column is the target."""
    size = logits.shape[1]
    if size == 0:
        return torch.full((logits.shape[0],), -torch.inf, device=logits.device)
    ours = (target >= 0) & (target < size)
    found = logits.gather(1, torch.where(ours, target, 0).unsqueeze(1)).squeeze(1).float()
    return torch.where(ours, found, -torch.inf)


def softmax_gradient(logits: Tensor, log_sum: Tensor, scale: Tensor, target: Tensor) -> None:
    """Turn logits [c, v] in place into exp(logit - log_sum) scale - [target].

    log_sum, scale [c] float32; target [c] int64, out of range = no column is the target.
    """
    size = logits.shape[1]
    result = logits.float().sub(log_sum.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))
    if size:
        ours = (target >= 0) & (target < size)
        result.scatter_add_(1, torch.where(ours, target, 0).unsqueeze(1), -ours.float().unsqueeze(1))
    logits.copy_(result)


def softmax_loss_and_gradient(
    logits: Tensor, target: Tensor, scored: Tensor, z_loss_weight: float
) -> tuple[Tensor, Tensor]:
    """What softmax_statistics, target_logits and softmax_gradient give where a rank holds all v columns, v > 0.

    logits [c, v], turned in place into the gradient by them of the sum over scored rows of
    log_sum - target_logit + z_loss_weight log_sum^2; target [c] int64, out of range = no column; scored [c] bool, and a row
    that is not scored must have no target. Returns log_sum and target_logit, [c] float32.
    """
    largest, exp_sum = softmax_statistics(logits)
    log_sum, target_logit = exp_sum.log() + largest, target_logits(logits, target)
    softmax_gradient(logits, log_sum, loss_scale(scored, log_sum, z_loss_weight), target)
    return log_sum, target_logit


def loss_scale(scored: Tensor, log_sum: Tensor, z_loss_weight: float) -> Tensor:
    """What the softmax of a row is times in the loss's gradient, [c] float32: 1 + 2 z_loss_weight log_sum, 0 if not scored."""
    return torch.where(scored, 1.0 + 2.0 * z_loss_weight * log_sum, 0.0)
