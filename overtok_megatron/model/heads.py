"""Both ends of the model: token (and n-gram) embedding in, final norm and language-model head out.

Shapes: b batch, s sequence (s_shard a slice under sequence parallelism), d hidden, v_shard this rank's part of the
vocabulary, T tables.
"""

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.model.norm import RMSNorm
from overtok_megatron.ngram.projection import NgramProjection
from overtok_megatron.parallel.collectives import (
    all_gather_sequence,
    copy_to_group,
    gather_from_group,
    reduce_from_group,
)
from overtok_megatron.parallel.cross_entropy import linear_cross_entropy
from overtok_megatron.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead


class InputEmbedding(nn.Module):
    """Token ids [b, s] and, where over-encoded, table slots [b, s / ranks, T] -> hidden [b, s_shard, d].

    Every rank of `group` looks up its own slice of the sequence in the n-gram tables, with or without sequence
    parallelism; without it the slices are gathered (contract C4).
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        over_encoding: NgramProjection | None = None,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.word = VocabParallelEmbedding(vocab_size, hidden_size, group=group, sequence_parallel=sequence_parallel)
        self.over_encoding = over_encoding

    def reset(self, seed: int, std: float) -> None:
        self.word.reset(seed, "embedding.word", std)
        if self.over_encoding is not None:
            self.over_encoding.reset(seed, "embedding.over_encoding")

    def forward(self, tokens: Tensor, slots: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.word(tokens)
        if self.over_encoding is None:
            return hidden
        assert slots is not None, "an over-encoded model needs the slots of its n-grams"
        ngrams = self.over_encoding(slots)
        if not self.sequence_parallel:
            ngrams = gather_from_group(ngrams, self.group, dim=1)
        return self.over_encoding.join(hidden, ngrams)


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

    def loss(
        self, hidden: Tensor, targets: Tensor, z_loss: float = 0.0, router_loss: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden [b, s_shard, d], targets [b, s] int64 (-100 = not scored), router_loss as `run_blocks` returns it.

        Returns float32 scalars: the summed objective (cross entropy plus z_loss times the squared log-partition plus the
        routers' loss; this one has the gradient), and the summed cross entropy alone, detached.
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
        if router_loss is not None:  # under sequence parallelism each rank has that of its own positions
            objective = objective + reduce_from_group(router_loss, self.group if self.sequence_parallel else None)
        return objective, cross_entropy

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [b, s_shard, d] -> [b, s, V] in the model's dtype, the whole vocabulary on every rank."""
        shard = F.linear(self._whole(hidden), self.output.weight)
        return self.output.gather(shard)
