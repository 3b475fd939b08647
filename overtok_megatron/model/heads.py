"""Both ends of the model: token (and n-gram) embedding in, final norm and language-model head out.

Shapes: b batch, s sequence (s_shard a slice under sequence parallelism), d hidden, v_shard this rank's part of the
vocabulary, T tables.
"""

from typing import NamedTuple

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.moe import Routing
from overtok_megatron.model.norm import RMSNorm
from overtok_megatron.parallel.collectives import (
    all_gather_sequence,
    copy_to_group,
    reduce_from_group,
)
from overtok_megatron.parallel.cross_entropy import linear_cross_entropy
from overtok_megatron.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead


class ForwardResult(NamedTuple):
    """What a forward pass of one micro-batch gives; losses are sums over its positions, float32 scalars.

    objective: what is minimised, the only part with a gradient. main_loss: the cross entropy of the next token.
    auxiliary_losses: what else is part of the objective, by name, times its weight. router_stats [layers, F]: see moe.py;
    None without experts. A named tuple because DeepSpeed looks for tensors in tuples and dictionaries, in no other types.
    """

    objective: Tensor
    main_loss: Tensor
    auxiliary_losses: dict[str, Tensor]
    router_stats: Tensor | None


class OutputHead(nn.Module):
    """Final norm, then the projection to the vocabulary, split over `group`; tied to the word embedding if given."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        norm_epsilon: float,
        kernels: Kernels,
        tied: VocabParallelEmbedding | None = None,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.kernels = kernels
        sequence_group = group if sequence_parallel else None
        self.norm = RMSNorm(hidden_size, eps=norm_epsilon, kernels=kernels, sum_group=sequence_group)
        self.output = VocabParallelHead(vocab_size, hidden_size, group=group, tied=tied)

    def reset(self, seed: int, std: float) -> None:
        self.output.reset(seed, "head.output", std)

    def _whole(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states of the whole sequence, ready for a product with a vocabulary shard."""
        normed = self.norm(hidden)
        if self.sequence_parallel:
            return all_gather_sequence(normed, self.group, dim=1)
        return copy_to_group(normed, self.group)

    def losses(
        self, hidden: Tensor, targets: Tensor, z_loss: float = 0.0, routing: Routing | None = None
    ) -> ForwardResult:
        """hidden [b, s_shard, d], targets int64 [b, s] (IGNORE_INDEX is not scored), routing as `run_blocks` returns it.

        z_loss: weight of the squared log-partition in the objective.
        """
        whole = self._whole(hidden).flatten(0, 1)  # [b s, d]
        objective, cross_entropy = linear_cross_entropy(
            whole,
            self.output.weight,
            targets.flatten(),
            vocab_start=self.output.vocab_start,
            group=self.group,
            z_loss=z_loss,
            kernels=self.kernels,
        )
        if routing is None:
            return ForwardResult(objective, cross_entropy, {}, None)
        # under sequence parallelism each rank has the loss of its own positions
        router_loss = reduce_from_group(routing.loss, self.group if self.sequence_parallel else None)
        auxiliary = {"router": router_loss.detach()}
        return ForwardResult(objective + router_loss, cross_entropy, auxiliary, routing.stats)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [b, s_shard, d] -> [b, s, V] in the model's dtype, the whole vocabulary on every rank."""
        shard = F.linear(self._whole(hidden), self.output.weight)
        return self.output.gather(shard)
