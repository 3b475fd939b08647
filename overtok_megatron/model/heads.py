"""The model's output: final norm, language-model head, and the losses of a micro-batch.

Shapes: b batch, s this context rank's slice of the sequence, s_shard the part of s that a tensor-parallel rank holds under
sequence parallelism (else s), d hidden, v_shard this rank's part of the vocabulary, V all of it, F statistics of a router.
"""

from typing import NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.feed_forward import Routing
from overtok_megatron.model.norm import RMSNorm
from overtok_megatron.parallel.collectives import (
    all_gather_sequence,
    copy_to_group,
    reduce_from_group,
)
from overtok_megatron.parallel.cross_entropy import linear_cross_entropy
from overtok_megatron.parallel.vocabulary import VocabParallelHead


class ForwardResult(NamedTuple):
    """What a forward pass of one micro-batch gives. Losses are SUMS over this rank's s positions, in nats, float32 scalars.

    objective: what is minimised, the only part with a gradient: the cross entropy, its z-loss (which linear_cross_entropy adds
    and nothing reports apart), and the auxiliary losses. main_loss: the summed cross entropy of the next token.
    auxiliary_losses: the losses of other layers by name, each times its weight. router_stats [layers, F]: see moe.py; None
    without experts. This is a named tuple because DeepSpeed finds tensors in tuples and dictionaries only.
    """

    objective: Tensor
    main_loss: Tensor
    auxiliary_losses: dict[str, Tensor]
    router_stats: Tensor | None


class OutputHead(nn.Module):
    """Final norm, then the projection to the vocabulary, which is split over `tensor_group`."""

    def __init__(
        self,
        *,
        norm: RMSNorm,
        output: VocabParallelHead,
        kernels: Kernels,
        tensor_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.tensor_group = tensor_group
        self.sequence_parallel = sequence_parallel
        self.kernels = kernels
        self.norm = norm
        self.output = output

    def reset(self, seed: int, std: float) -> None:
        self.output.reset(seed, "head.output", std)

    def _normed(self, hidden: Tensor) -> Tensor:
        """hidden [b, s_shard, d] -> normalised [b, s, d], ready for a product with this rank's part of the vocabulary."""
        normed = self.norm(hidden)
        if self.sequence_parallel:
            return all_gather_sequence(normed, self.tensor_group, dim=1)
        return copy_to_group(normed, self.tensor_group)

    def forward_losses(
        self, hidden: Tensor, targets: Tensor, *, z_loss_weight: float = 0.0, routing: Routing | None = None
    ) -> ForwardResult:
        """hidden [b, s_shard, d], targets int64 [b, s] (IGNORE_INDEX is not scored), routing as `run_blocks` returns it.

        z_loss_weight: weight of the squared log-partition in the objective.
        """
        objective, cross_entropy = linear_cross_entropy(
            self._normed(hidden).flatten(0, 1),  # [b s, d]
            self.output.weight,
            targets.flatten(),
            vocab_start=self.output.vocab_start,
            group=self.tensor_group,
            z_loss_weight=z_loss_weight,
            kernels=self.kernels,
        )
        if routing is None:
            return ForwardResult(objective, cross_entropy, {}, None)
        # Under sequence parallelism each rank has the router loss of its own positions.
        router_loss = reduce_from_group(routing.loss, self.tensor_group if self.sequence_parallel else None)
        auxiliary = {"router": router_loss.detach()}
        return ForwardResult(objective + router_loss, cross_entropy, auxiliary, routing.stats)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [b, s_shard, d] -> [b, s, V] in the model's dtype, all of the vocabulary on every rank."""
        shard = F.linear(self._normed(hidden), self.output.weight)
        return self.output.gather(shard)
