"""Rotary position embedding in the half-rotation form of Llama and OLMo2, computed in float32.

Shapes: b batch, s sequence, h heads, e head size.
"""

from typing import Any

import torch
from torch import Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, s, h, e]; cos, sin [(b,) s, 1, e/2] float32. Pairs are (i, i + e/2)."""
    first, second = x.chunk(2, dim=-1)
    result = torch.empty_like(x)
    half = x.shape[-1] // 2
    result[..., :half] = torch.mul(first, cos).sub_(torch.mul(second, sin))
    result[..., half:] = torch.mul(second, cos).add_(torch.mul(first, sin))
    return result


class _Rotate(torch.autograd.Function):
    """The backward of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]  # torch: *Any
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin.neg()), None, None


class Rotary:
    """Angles position * theta^(-2i/e). Deliberately no module: casting a model to bfloat16 must not round the angles."""

    def __init__(self, head_size: int, theta: float) -> None:
        assert head_size % 2 == 0
        self.head_size = head_size
        self.theta = theta
        self._frequencies: Tensor | None = None
        self._training_angles: tuple[Tensor, Tensor] | None = None

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [..., s, 1, e/2] float32 of positions [..., s] int64."""
        if self._frequencies is None or self._frequencies.device != positions.device:
            exponents = torch.arange(0, self.head_size, 2, dtype=torch.float32, device=positions.device)
            self._frequencies = 1.0 / self.theta ** (exponents / self.head_size)
        angles = positions.float().unsqueeze(-1) * self._frequencies  # [..., s, e/2]
        return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)

    def leading_angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Angles of positions 0 .. length-1, kept from call to call."""
        kept = self._training_angles
        if kept is None or kept[0].shape[0] != length or kept[0].device != device:
            kept = self._training_angles = self.angles(torch.arange(length, device=device))
        return kept

    @staticmethod
    def apply(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate x [b, s, h, e] by `angles`; same dtype out."""
        result: Tensor = _Rotate.apply(x, *angles)
        return result
