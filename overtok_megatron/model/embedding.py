"""The model's input: token and n-gram embedding. Shapes: b batch, s sequence (s_shard a slice of it), d hidden, T tables."""

import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.ngram.projection import NgramProjection
from overtok_megatron.parallel.collectives import gather_from_group
from overtok_megatron.parallel.vocabulary import VocabParallelEmbedding


class InputEmbedding(nn.Module):
    """Token ids [b, s] and, where over-encoded, fetched rows [b, s / ranks, T] -> hidden [b, s_shard, d].

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

    def forward(self, tokens: Tensor, fetched: FetchedRows | None = None) -> Tensor:
        hidden: Tensor = self.word(tokens)
        if self.over_encoding is None:
            return hidden
        assert fetched is not None, "an over-encoded model needs the rows of its n-grams"
        ngrams = self.over_encoding(fetched)
        if not self.sequence_parallel:
            ngrams = gather_from_group(ngrams, self.group, dim=1)
        return self.over_encoding.join(hidden, ngrams)
