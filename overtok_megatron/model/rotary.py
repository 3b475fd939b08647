"""Angles of the rotary position embedding, also scaled for contexts longer than those of pretraining.

Shapes: b batch, s sequence, e head size. Frequencies and factors are those of transformers' ROPE_INIT_FUNCTIONS.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from overtok_megatron.config.schema import RopeScalingType


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies change for a context that is `factor` times the original one.

    linear: all are divided by factor. llama3: those with a wavelength above context / low_freq_factor are divided, those with
    one below context / high_freq_factor are kept, the others are interpolated (Llama 3.1). yarn: those with more than
    beta_fast rotations in the original context are kept, those with fewer than beta_slow are divided, with a linear ramp over
    the dimensions in between; cosines and sines are multiplied by attention_factor (arXiv 2309.00071).
    """

    type: RopeScalingType
    factor: float
    original_length: int = 1
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        """The factor of cosines and sines."""
        if self.type != "yarn":
            return 1.0
        return 1.0 + 0.1 * math.log(self.factor) if self.attention_factor is None else self.attention_factor

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """Frequencies theta^(-2i/e), [e/2] float32 -> the frequencies for the longer context."""
        stretched = frequencies / self.factor
        if self.type == "linear":
            return stretched
        if self.type == "llama3":
            rotations = self.original_length * frequencies / (2 * math.pi)
            kept = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            kept = self._yarn_kept(frequencies, theta)
        kept = kept.clamp(0.0, 1.0)
        return stretched * (1.0 - kept) + frequencies * kept

    def _yarn_kept(self, frequencies: Tensor, theta: float) -> Tensor:
        """Share of each frequency that is kept, before clamping: linear between two dimensions, each rounded outwards."""
        size = 2 * frequencies.numel()

        def dimension(rotations: float) -> float:
            return size * math.log(self.original_length / (2 * math.pi * rotations)) / (2 * math.log(theta))

        first = max(math.floor(dimension(self.beta_fast)), 0)
        last = min(math.ceil(dimension(self.beta_slow)), size - 1)
        indices = torch.arange(frequencies.numel(), dtype=torch.float32, device=frequencies.device)
        return 1.0 - (indices - first) / (last - first if last != first else 0.001)


class Rotary:
    """Angles position * theta^(-2i/e). Not a module, because casting a model to bfloat16 must not round the angles."""

    def __init__(self, head_size: int, theta: float, scaling: RopeScaling | None = None) -> None:
        assert head_size % 2 == 0
        self.head_size = head_size
        self.theta = theta
        self.scaling = scaling
        self._frequencies: Tensor | None = None
        self._kept: tuple[tuple[int, int, torch.device], tuple[Tensor, Tensor]] | None = None

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [..., s, 1, e/2] float32 of positions [..., s] int64."""
        if self._frequencies is None or self._frequencies.device != positions.device:
            exponents = torch.arange(0, self.head_size, 2, dtype=torch.float32, device=positions.device)
            self._frequencies = 1.0 / self.theta ** (exponents / self.head_size)
            if self.scaling is not None:
                self._frequencies = self.scaling.stretch(self._frequencies, self.theta)
        angles = positions.float().unsqueeze(-1) * self._frequencies  # [..., s, e/2]
        cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
        if self.scaling is not None and self.scaling.amplitude != 1.0:
            return cos * self.scaling.amplitude, sin * self.scaling.amplitude
        return cos, sin

    def range_angles(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Angles of positions start .. start + length - 1; the last result is kept for the next layer and step."""
        key = (start, length, device)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.angles(torch.arange(start, start + length, device=device))
        return self._kept[1]
