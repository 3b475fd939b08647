"""The model's output: final norm, language-model head, and the losses of a micro-batch.

Heads for later tokens than the next are in files of their own; here is what they take and give. D' is how many tokens after
the next one they look ahead, D how many of these tokens some of them read as inputs.

Shapes: b batch, s this context rank's slice of the sequence, s_shard the part of s that a tensor-parallel rank holds under
sequence parallelism (else s), d hidden, v_shard this rank's part of the vocabulary, V all of it, F statistics of a router.
"""

from collections.abc import Callable, Sequence
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
    auxiliary_losses: the losses of other layers by name: that of routers times its weight, those of heads for later tokens as
    summed cross entropies, without weights. router_stats [layers, F]: see moe.py; None without experts. This is a named tuple
    because DeepSpeed finds tensors in tuples and dictionaries only.
    """

    objective: Tensor
    main_loss: Tensor
    auxiliary_losses: dict[str, Tensor]
    router_stats: Tensor | None


class LaterTokens(NamedTuple):
    """What heads for later tokens take of a micro-batch, for the s positions of this context rank.

    targets: entry j - 1 of D', int64 [b, s], is for position t the token t + 1 + j; IGNORE_INDEX is not scored. inputs: entry
    i - 1 of D, int64 [b, s], is the token t + i; a token of the vocabulary everywhere. scales float32 [D']: entry j - 1 is the
    tokens of a step over the positions that its targets[j - 1] score on all ranks, 0 where they score none. A sum over
    positions times its scale joins the objective as a mean over the positions that are scored.
    """

    targets: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    scales: Tensor


class LaterLosses(NamedTuple):
    """What heads for later tokens give: their part of the objective, and by name their summed cross entropies, without it."""

    objective: Tensor
    cross_entropies: dict[str, Tensor]


# From the normalised hidden states, as this rank has them [b, s_shard, d] and as the head multiplies them [b, s, d].
LaterHead = Callable[[Tensor, Tensor], LaterLosses]


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

    def gathered(self, normed: Tensor) -> Tensor:
        """Normalised [b, s_shard, d] -> [b, s, d], ready for a product with this rank's part of the vocabulary."""
        if self.sequence_parallel:
            return all_gather_sequence(normed, self.tensor_group, dim=1)
        return copy_to_group(normed, self.tensor_group)

    def cross_entropy(self, normed: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`linear_cross_entropy` of other normalised hidden states [b, s_shard, d] with targets int64 [b, s]."""
        return linear_cross_entropy(
            self.gathered(normed).flatten(0, 1),  # [b s, d]
            self.output.weight,
            targets.flatten(),
            vocab_start=self.output.vocab_start,
            group=self.tensor_group,
            kernels=self.kernels,
        )

    def summed_router_loss(self, routing: Routing) -> Tensor:
        """A loss of routers over all s positions: under sequence parallelism each rank has that of its own positions."""
        return reduce_from_group(routing.loss, self.tensor_group if self.sequence_parallel else None)

    def forward_losses(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        z_loss_weight: float = 0.0,
        routing: Routing | None = None,
        later_heads: Sequence[LaterHead] = (),
    ) -> ForwardResult:
        """hidden [b, s_shard, d], targets int64 [b, s] (IGNORE_INDEX is not scored), routing as `run_blocks` returns it.

        z_loss_weight: weight of the squared log-partition in the objective. later_heads: called one after the other.
        """
        normed = self.norm(hidden)
        gathered = self.gathered(normed)
        objective, cross_entropy = linear_cross_entropy(
            gathered.flatten(0, 1),  # [b s, d]
            self.output.weight,
            targets.flatten(),
            vocab_start=self.output.vocab_start,
            group=self.tensor_group,
            z_loss_weight=z_loss_weight,
            kernels=self.kernels,
        )
        auxiliary: dict[str, Tensor] = {}
        for later_head in later_heads:
            later = later_head(normed, gathered)
            objective = objective + later.objective
            auxiliary |= later.cross_entropies
        if routing is None:
            return ForwardResult(objective, cross_entropy, auxiliary, None)
        router_loss = self.summed_router_loss(routing)
        auxiliary["router"] = router_loss.detach()
        return ForwardResult(objective + router_loss, cross_entropy, auxiliary, routing.stats)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [b, s_shard, d] -> [b, s, V] in the model's dtype, all of the vocabulary on every rank."""
        return self.project(self.norm(hidden))

    def project(self, normed: Tensor) -> Tensor:
        """Hidden states after the final norm [b, s_shard, d] -> logits [b, s, V], as `logits`."""
        return self.output.gather(F.linear(self.gathered(normed), self.output.weight))
