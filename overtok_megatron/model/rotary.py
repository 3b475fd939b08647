"""Angles of the rotary position embedding. Shapes: b batch, s sequence, e head size."""

import torch
from torch import Tensor


class Rotary:
    """Angles position * theta^(-2i/e). Deliberately no module: casting a model to bfloat16 must not round the angles."""

    def __init__(self, head_size: int, theta: float) -> None:
        assert head_size % 2 == 0
        self.head_size = head_size
        self.theta = theta
        self._frequencies: Tensor | None = None
        self._kept: tuple[tuple[int, int, torch.device], tuple[Tensor, Tensor]] | None = None

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [..., s, 1, e/2] float32 of positions [..., s] int64."""
        if self._frequencies is None or self._frequencies.device != positions.device:
            exponents = torch.arange(0, self.head_size, 2, dtype=torch.float32, device=positions.device)
            self._frequencies = 1.0 / self.theta ** (exponents / self.head_size)
        angles = positions.float().unsqueeze(-1) * self._frequencies  # [..., s, e/2]
        return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)

    def range_angles(self, begin: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Angles of positions begin .. begin + length - 1, kept from call to call."""
        place = (begin, length, device)
        if self._kept is None or self._kept[0] != place:
            self._kept = place, self.angles(torch.arange(begin, begin + length, device=device))
        return self._kept[1]
