"""The word embedding and the output weight, [V, d] each, split by vocabulary without padding: parts may be unequal or empty.

Shapes: b batch, s sequence (s_shard the slice of a tensor-parallel rank under sequence parallelism), d hidden, V vocabulary,
v_shard this rank's part of it.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from overtok_megatron.parallel.collectives import (
    group_rank,
    group_size,
    reduce_from_group,
    reduce_scatter_sequence,
)
from overtok_megatron.parallel.spans import profiler_span
from overtok_megatron.parallel.splits import initialise, mark_split, split_range


class VocabParallelEmbedding(nn.Module):
    """Token ids [b, s] int64 -> [b, s, d] on every rank, or its sequence slice [b, s_shard, d]."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.full_shape = (vocab_size, hidden_size)
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.start, self.stop = split_range(vocab_size, group_size(group), group_rank(group))
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, hidden_size))
        mark_split(self.weight, dim=0, full_shape=self.full_shape, group=group)

    def reset(self, seed: int, name: str, std: float) -> None:
        initialise(self.weight, std, seed, f"{name}.weight")

    def forward(self, tokens: Tensor) -> Tensor:
        if self.group is None:
            return F.embedding(tokens, self.weight)
        ours = (tokens >= self.start) & (tokens < self.stop)
        if self.stop > self.start:
            found = F.embedding(torch.where(ours, tokens - self.start, 0), self.weight)
            found = torch.where(ours.unsqueeze(-1), found, 0.0)
        else:  # a rank with an empty part still takes part in the sum over ranks, and in the autograd graph
            found = self.weight.sum() + torch.zeros(*tokens.shape, self.full_shape[1]).to(self.weight)
        if self.sequence_parallel:
            return reduce_scatter_sequence(found, self.group, 1)
        return reduce_from_group(found, self.group)

    def extra_repr(self) -> str:
        return f"vocab {self.start}..{self.stop} of {self.full_shape[0]}, hidden_size={self.full_shape[1]}"


class VocabParallelHead(nn.Module):
    """Holds the output weight [v_shard, d]: its own, or the embedding's if tied. The caller computes the product."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        group: dist.ProcessGroup | None = None,
        tied: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.full_shape = (vocab_size, hidden_size)
        self.group = group
        self.vocab_start, self.vocab_stop = split_range(vocab_size, group_size(group), group_rank(group))
        self.is_tied = tied is not None
        if tied is not None:
            self.weight = tied.weight
            return
        self.weight = nn.Parameter(torch.empty(self.vocab_stop - self.vocab_start, hidden_size))
        mark_split(self.weight, dim=0, full_shape=self.full_shape, group=group)

    def reset(self, seed: int, name: str, std: float) -> None:
        if not self.is_tied:
            initialise(self.weight, std, seed, f"{name}.weight")

    @torch.no_grad()
    def gather(self, logits_shard: Tensor) -> Tensor:
        """[.., v_shard] of every rank -> [.., V] on every rank, without a gradient. All ranks must call this."""
        if self.group is None:
            return logits_shard
        ranks = group_size(self.group)
        widths = [stop - start for start, stop in (split_range(self.full_shape[0], ranks, r) for r in range(ranks))]
        padded = F.pad(logits_shard, (0, max(widths) - logits_shard.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        with profiler_span("all-gather of logits", self.group):
            dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def extra_repr(self) -> str:
        return f"vocab {self.vocab_start}..{self.vocab_stop} of {self.full_shape[0]}, tied={self.is_tied}"
