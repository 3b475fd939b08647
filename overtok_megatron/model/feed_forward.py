"""What every feed-forward layer of a block gives: its output, and where a router chose experts, what the router reports.

Dense SwiGLU is in mlp.py, the mixture of experts in moe.py. Shapes: b batch, s_shard this rank's positions (a slice of the
sequence under context and under sequence parallelism), d hidden, F statistics of a router.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Routing(NamedTuple):
    """What routers report. loss: float32 scalar, summed over this rank's positions, times its weight. stats: of one layer
    [F], or of several [blocks, F] (moe.py says what they are)."""

    loss: Tensor
    stats: Tensor


class FeedForward(nn.Module, ABC):
    """The interface that `Block` knows."""

    @abstractmethod
    def reset(self, seed: int, name: str, std: float) -> None:
        """Draw initial weights from normal(0, std): each is a slice of the full weight, which depends on (seed, its name)."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """[b, s_shard, d] -> [b, s_shard, d], summed over the tensor group already; no Routing where nothing is routed."""
