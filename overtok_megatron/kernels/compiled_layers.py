"""The two halves of a transformer layer, before and after its attention core, each compiled as one function.

For training on one tensor-parallel rank: no collective stands inside, so Inductor sees matrix products, norms, rotation and
residual sums at once. It fuses more than it can pass by pass, and above all the host calls two functions per layer and
direction instead of a dozen: on an NVIDIA H100 the host was slower than the card. The core stays outside, with its windows,
documents and context-parallel exchange.

The formulas are those of compiled.py, which compute in float32 and round once. All sizes are constants for the compiler,
because training has one shape; other shapes of a process are compiled anew.

Shapes: b batch, s sequence, d hidden, f feed-forward size, h query heads, g key/value heads, e head size.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.kernels.compiled import (
    CompiledPass,
    add_normed,
    norm_and_rotate,
    norm_of_sum,
    rms_norm,
    rotate,
    swiglu,
)


class BeforeCore(NamedTuple):
    """Weights of the half before the core. norm [d]: None in a post-norm layer. q_norm [h e], k_norm [g e]: None without."""

    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


class AfterCore(NamedTuple):
    """Weights of the half after the core. attention_norm [d]: None in a pre-norm layer."""

    o_proj: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    attention_norm: Tensor | None
    mlp_norm: Tensor


def _before_core(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    norm: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    normed = x if norm is None else rms_norm(x, norm, eps)
    weights = [q_proj, k_proj, v_proj]
    q, k, v = F.linear(normed, torch.cat(weights)).split([weight.shape[0] for weight in weights], dim=-1)
    cos, sin = cos.squeeze(-2), sin.squeeze(-2)
    q = rotate(q, cos, sin) if q_norm is None else norm_and_rotate(q, q_norm, cos, sin, eps)
    k = rotate(k, cos, sin) if k_norm is None else norm_and_rotate(k, k_norm, cos, sin, eps)
    return q, k, v.unflatten(-1, (-1, 2 * cos.shape[-1]))


def _after_core(
    x: Tensor,
    mixed: Tensor,
    o_proj: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    attention_norm: Tensor | None,
    mlp_norm: Tensor,
    eps: float,
) -> Tensor:
    branch = F.linear(mixed.transpose(1, 2).flatten(2), o_proj)
    if attention_norm is None:
        x, entered = norm_of_sum(x, branch, mlp_norm, eps)
    else:
        x = entered = add_normed(x, branch, attention_norm, eps)
    branch = F.linear(swiglu(F.linear(entered, torch.cat([gate_proj, up_proj]))), down_proj)
    return x + branch if attention_norm is None else add_normed(x, branch, mlp_norm, eps)


class CompiledLayers:
    """The halves, compiled at their first use."""

    def __init__(self) -> None:
        self._before_core = CompiledPass(_before_core)
        self._after_core = CompiledPass(_after_core)

    def before_core(
        self, x: Tensor, cos: Tensor, sin: Tensor, weights: BeforeCore, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, s, d]; cos, sin [s, 1, e/2] float32 -> q [b, h, s, e], k and v [b, g, s, e]."""
        q, k, v = self._before_core((x, cos, sin, *weights), (0,) * (3 + len(weights)), eps)
        # Outside, because AOTAutograd takes the gradients of its results to be contiguous, and copies those that are not: the
        # gradients of attention lie in memory as q, k and v do, with the heads of a position side by side.
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def after_core(self, x: Tensor, mixed: Tensor, weights: AfterCore, eps: float) -> Tensor:
        """The layer's input x [b, s, d] and what its core gave, mixed [b, h, s, e] -> the layer's output [b, s, d]."""
        result: Tensor = self._after_core((x, mixed, *weights), (0,) * (2 + len(weights)), eps)
        return result


@lru_cache(maxsize=1)
def compiled_layers() -> CompiledLayers:
    """One for the process, so that all layers, and a second model, find what the first has compiled."""
    return CompiledLayers()
