"""One micro-batch on one rank: what goes into the model, and what this rank's layers give back, with a pipeline or without.

Shapes: b micro batch, s sequence, slices of which the context ranks hold; T tables; F statistics of a router.
"""

from typing import NamedTuple

from torch import Tensor

from overtok_megatron.model.heads import LaterTokens
from overtok_megatron.ngram.fetched_rows import FetchedRows


def with_own_kind_of_gradient(objective: Tensor) -> Tensor:
    """The same objective, whose gradient is not finite where the objective is not.

    Whether a step gets its update is decided by the joint gradient norm, which all ranks know before it, so that a loss that is
    not finite needs no reduction of its own. The factor is exactly 1, or NaN.
    """
    return objective * (1.0 + 0.0 * objective.detach())


class MicroBatch(NamedTuple):
    """What a rank handles of one micro-batch.

    full_inputs int64 [b, s]: the input tokens of all context ranks. inputs, targets int64 [b, s / context ranks]: this rank's
    slice. fetched [b, s / (context ranks x tensor ranks), T]: the rows that this rank looked up, on any stage; None where it
    looks nothing up. later: what heads for later tokens take, for this rank's slice; None without such heads, on stages that
    do not hold them, and in evaluation.
    """

    full_inputs: Tensor
    inputs: Tensor
    fetched: FetchedRows | None
    targets: Tensor
    later: LaterTokens | None = None


class StageResults(NamedTuple):
    """What a rank's layers computed in a step, one entry per micro-batch; without a pipeline they are all layers.

    main_losses: summed cross entropies, on the last stage only. router_stats [blocks of this stage, F]: with experts only.
    auxiliary_losses: sums of this stage's auxiliary losses by name (`ForwardResult`), the same on all of its tensor ranks.
    """

    main_losses: list[Tensor]
    router_stats: list[Tensor]
    auxiliary_losses: list[dict[str, Tensor]]

    def add(self, main_loss: Tensor | None, stats: Tensor | None, auxiliary_losses: dict[str, Tensor]) -> None:
        if main_loss is not None:
            self.main_losses.append(main_loss)
        if stats is not None:
            self.router_stats.append(stats)
        self.auxiliary_losses.append(auxiliary_losses)
