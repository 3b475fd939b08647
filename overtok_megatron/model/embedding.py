"""The model's input: token and n-gram embedding.

Shapes: b batch, s this context rank's slice of the sequence, s_shard the part of s that a tensor-parallel rank holds under
sequence parallelism (else s), s_lookup the part of s that a tensor-parallel rank looks up (s / ranks of the group), d hidden,
T tables.
"""

from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.ngram.projection import NgramProjection
from overtok_megatron.parallel.collectives import gather_from_group
from overtok_megatron.parallel.vocabulary import VocabParallelEmbedding

EmbeddingPart = Literal["word", "over_encoding"]  # the dense parts, by the names that their parameters have


class InputEmbedding(nn.Module):
    """Token ids [b, s] and, where over-encoded, fetched rows [b, s_lookup, T] -> hidden [b, s_shard, d].

    Every rank of `tensor_group` looks up its own slice of the sequence in the n-gram tables, with sequence parallelism or
    without; without it the slices are gathered (contract C4). A pipeline stage that holds copies for its head may lack one
    of the two parts; the stage that runs this module has `word`, and `over_encoding` if the model is over-encoded. Without
    `word` the input of an over-encoded model is its n-grams alone.
    """

    def __init__(
        self,
        *,
        word: VocabParallelEmbedding | None,
        over_encoding: NgramProjection | None = None,
        tensor_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.tensor_group = tensor_group
        self.sequence_parallel = sequence_parallel
        self.word = word
        self.over_encoding = over_encoding

    def reset(self, seed: int, std: float) -> None:
        if self.word is not None:
            self.word.reset(seed, "embedding.word", std)
        if self.over_encoding is not None:
            self.over_encoding.reset(seed, "embedding.over_encoding")

    def forward(self, tokens: Tensor, fetched: FetchedRows | None = None) -> Tensor:
        hidden: Tensor | None = None if self.word is None else self.word(tokens)
        if self.over_encoding is None:
            assert hidden is not None, "this stage holds no copy of the word embedding"
            return hidden
        assert fetched is not None, "an over-encoded model needs the rows of its n-grams"
        ngrams = self.over_encoding(fetched)
        if not self.sequence_parallel:
            ngrams = gather_from_group(ngrams, self.tensor_group, dim=1)
        return self.over_encoding.join(hidden, ngrams)
