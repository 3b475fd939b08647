"""The list of layers of a model or of a pipeline stage, and the plain module made of it, for ZeRO and for inference.

Shapes: b batch, s this context rank's slice of the sequence, s_shard the part of s that a tensor-parallel rank holds under
sequence parallelism (else s), s_lookup the part of s that a tensor-parallel rank looks up (s / ranks of the group), d hidden,
T tables, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor, nn

from overtok_megatron.kernels.documents import Documents
from overtok_megatron.model.attention import DecodeStep
from overtok_megatron.model.block import Block, run_blocks
from overtok_megatron.model.documents import document_ids
from overtok_megatron.model.embedding import EmbeddingPart, InputEmbedding
from overtok_megatron.model.feed_forward import Routing
from overtok_megatron.model.heads import ForwardResult, LaterHead, LaterTokens, OutputHead
from overtok_megatron.model.multi_token import MultiTokenPrediction
from overtok_megatron.model.over_decoding import OverDecoding
from overtok_megatron.ngram.fetched_rows import FetchedRows


@dataclass(frozen=True)
class Stage:
    """Blocks [start, stop) of the model; the embedding if `first`, the head if `last`."""

    first: bool
    last: bool
    start: int
    stop: int

    @classmethod
    def of(cls, index: int, blocks_per_stage: Sequence[int]) -> "Stage":
        ends = list(accumulate(blocks_per_stage, initial=0))
        return cls(index == 0, index == len(blocks_per_stage) - 1, ends[index], ends[index + 1])


class Layers(NamedTuple):
    """What one pipeline stage holds, or without a pipeline the whole model; blocks by their number in the model.

    over_decoding: output tables beside the head; None without them. shared: the dense parts of the embedding that the first and
    the last stage both hold. On the last of several stages `embedding` holds these copies only, for its head; the stage does
    not run it on its input.
    """

    embedding: InputEmbedding | None
    blocks: dict[int, Block]
    head: OutputHead | None
    shared: tuple[EmbeddingPart, ...] = ()
    over_decoding: OverDecoding | None = None
    multi_token: MultiTokenPrediction | None = None

    @property
    def all(self) -> list[nn.Module]:
        """Every layer that this stage holds, in order."""
        layers = (self.embedding, *self.blocks.values(), self.head, self.over_decoding, self.multi_token)
        return [layer for layer in layers if layer is not None]

    def reset(self, seed: int, std: float) -> None:
        """Draw initial weights: each is a slice of the full weight, which depends on (seed, its name) and not on the layout."""
        if self.embedding is not None:
            self.embedding.reset(seed, std)
        for index, block in self.blocks.items():
            block.reset(seed, f"blocks.{index}", std)
        if self.head is not None:
            self.head.reset(seed, std)
        if self.over_decoding is not None:
            self.over_decoding.reset(seed, std)
        if self.multi_token is not None:
            self.multi_token.reset(seed, std)

    def later_heads(
        self, later: LaterTokens | None, fetched: FetchedRows | None, documents: Documents | None
    ) -> list[LaterHead]:
        """The heads for later tokens of a micro-batch; none where `later` is None, as in evaluation.

        fetched, documents: for heads that read further tokens.
        """
        heads: list[LaterHead] = []
        if later is not None and self.over_decoding is not None:
            heads.append(partial(self.over_decoding, later=later))
        if later is not None and self.multi_token is not None:
            assert self.embedding is not None and self.head is not None
            heads.append(self.multi_token.later_head(later, self.embedding, fetched, self.head, documents))
        return heads


class Transformer(nn.Module):
    """Embedding, blocks and head, with the heads for later tokens that the model has, called one after the other.

    eod_id: the token that ends a document, where positions attend within their document only; None = across documents.
    z_loss_weight: of the squared log-partition in the objective of training; 0.0 in evaluation.
    """

    def __init__(self, layers: Layers, *, eod_id: int | None = None, z_loss_weight: float = 0.0) -> None:
        super().__init__()
        self.eod_id = eod_id
        self.z_loss_weight = z_loss_weight
        assert layers.embedding is not None and layers.head is not None, "one stage of a pipeline is not a whole model"
        self._layers = layers
        self.embedding = layers.embedding
        self.blocks = nn.ModuleList(layers.blocks.values())
        self.head = layers.head
        self.over_decoding = layers.over_decoding
        self.multi_token = layers.multi_token

    def hidden(
        self,
        tokens: Tensor,
        fetched: FetchedRows | None = None,
        decode: DecodeStep | None = None,
        full_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The last hidden states [b, s_shard, d], before the final norm, and with experts what the routers report.

        tokens int64 [b, s], fetched [b, s_lookup, T]. full_tokens: those of all context ranks; None = `tokens` are all.
        """
        documents = None if decode is not None else self._documents(tokens if full_tokens is None else full_tokens)
        return run_blocks(self.blocks, self.embedding(tokens, fetched), decode, documents)

    def _documents(self, full_tokens: Tensor) -> Documents | None:
        return None if self.eod_id is None else Documents(document_ids(full_tokens, self.eod_id))

    def forward(
        self,
        tokens: Tensor,
        fetched: FetchedRows | None,
        targets: Tensor,
        *,
        full_tokens: Tensor | None = None,
        later: LaterTokens | None = None,
    ) -> ForwardResult:
        """The losses of a micro-batch.

        tokens and targets int64 [b, s] (IGNORE_INDEX is not scored), fetched [b, s_lookup, T], full_tokens as in `hidden`.
        later: for heads of later tokens, which do not run without it; with D inputs in it fetched is [b, s_lookup + D, T].
        """
        documents = self._documents(tokens if full_tokens is None else full_tokens)
        heads = self._layers.later_heads(later, fetched, documents)
        own = fetched
        if later is not None and fetched is not None:
            own = fetched.positions(0, fetched.slots.shape[-2] - len(later.inputs))
        hidden, routing = run_blocks(self.blocks, self.embedding(tokens, own), documents=documents)
        z_loss_weight = self.z_loss_weight if self.training else 0.0
        return self.head.forward_losses(
            hidden, targets, z_loss_weight=z_loss_weight, routing=routing, later_heads=heads
        )

    def logits(self, tokens: Tensor, fetched: FetchedRows | None = None, decode: DecodeStep | None = None) -> Tensor:
        """tokens [b, s] -> [b, s, V]."""
        return self.head.logits(self.hidden(tokens, fetched, decode)[0])
