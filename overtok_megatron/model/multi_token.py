"""Multi-token prediction in the form of DeepSeek-V3 (arXiv 2412.19437, section 2.2): one more layer per further token.

Depth d = 1 .. D predicts, at position t, the token t + d + 1. It reads what depth d - 1 gave for position t (depth 1: the main
model's hidden state after the final norm) and the embedding of token t + d, over-encoded like every input. Both are normed,
joined and projected back to the hidden size; a block and a norm follow, and the output weight is the main head's. The form and
the order of the joined halves are those of transformers' `MtpLayer`.

Shapes: b batch, s this context rank's slice of the sequence, s_shard the part of s that a tensor-parallel rank holds under
sequence parallelism (else s), s_lookup the part of s that a tensor-parallel rank looks up, d hidden.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from overtok_megatron.kernels.documents import Documents
from overtok_megatron.model.attention import DecodeStep
from overtok_megatron.model.block import Block
from overtok_megatron.model.embedding import InputEmbedding
from overtok_megatron.model.feed_forward import Routing
from overtok_megatron.model.heads import LaterHead, LaterLosses, LaterTokens, OutputHead
from overtok_megatron.model.norm import RMSNorm
from overtok_megatron.ngram.fetched_rows import FetchedRows
from overtok_megatron.parallel.collectives import split_over_group
from overtok_megatron.parallel.linear import SlicedInputLinear

# Depth d = 1 .. D -> the embeddings [b, s_shard, d] of the tokens d after each position.
Embed = Callable[[int], Tensor]


class MultiTokenLayer(nn.Module):
    """One depth: hidden states [b, s_shard, d] and embeddings of the tokens after them [b, s_shard, d] -> [b, s_shard, d].

    The two norms and the projection run on this tensor-parallel rank's slice of the sequence, with sequence parallelism or
    without, so the gradients of their weights must be summed over the group (`sum_group` of these norms). The weight of the
    projection is on all ranks, because a split one would gather its two inputs.
    """

    def __init__(
        self,
        *,
        embedding_norm: RMSNorm,
        hidden_norm: RMSNorm,
        projection: SlicedInputLinear,
        block: Block,
        norm: RMSNorm,
        tensor_group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.split_group = None if sequence_parallel else tensor_group  # over which inputs are still to be split
        # The names and the order of these are those of parameters in checkpoints.
        self.embedding_norm = embedding_norm
        self.hidden_norm = hidden_norm
        self.projection = projection
        self.block = block
        self.norm = norm

    def reset(self, seed: int, name: str, std: float) -> None:
        """Draw initial weights, which depend on (seed, name) and not on the layout."""
        self.projection.reset(seed, f"{name}.projection", std)
        self.block.reset(seed, f"{name}.block", std)

    def forward(
        self, hidden: Tensor, embedding: Tensor, decode: DecodeStep | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The normed hidden states, which the head and the next depth read, and what the block's router reports.

        documents: as in `Attention`; those of the positions, not of the tokens after them.
        """
        embedding, hidden = (split_over_group(x, self.split_group, dim=1) for x in (embedding, hidden))
        joined = torch.cat([self.embedding_norm(embedding), self.hidden_norm(hidden)], dim=-1)
        out, routing = self.block(self.projection(joined), decode, documents)
        return self.norm(out), routing


class MultiTokenPrediction(nn.Module):
    """The layers of all D depths. In the objective the loss of each has the weight `loss_weight` / D (eq. 25)."""

    def __init__(self, layers: Sequence[MultiTokenLayer], *, loss_weight: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.loss_weight = loss_weight

    @property
    def depth(self) -> int:
        """D."""
        return len(self.layers)

    def reset(self, seed: int, std: float) -> None:
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, MultiTokenLayer)
            layer.reset(seed, f"multi_token.layers.{index}", std)

    def states(
        self,
        hidden: Tensor,
        embed: Embed,
        decode: DecodeStep | None = None,
        documents: Documents | None = None,
    ) -> Iterator[tuple[Tensor, Routing | None]]:
        """What each depth gives, in turn: its normed hidden states [b, s_shard, d], and what its router reports.

        hidden [b, s_shard, d]: after the final norm. embed is called once per depth.
        """
        for index, layer in enumerate(self.layers):
            hidden, routing = layer(hidden, embed(index + 1), decode, documents)
            yield hidden, routing

    def losses(
        self,
        hidden: Tensor,
        later: LaterTokens,
        embed: Embed,
        head: OutputHead,
        documents: Documents | None = None,
    ) -> LaterLosses:
        """The losses of all depths of a micro-batch. hidden, embed: as in `states`. head: whose output weight they share.

        With experts the routers' losses of these layers join the objective as those of other layers do, but not where
        `loss_weight` is 0: their gradients would reach the main model.
        """
        objective = hidden.new_zeros((), dtype=torch.float32)
        cross_entropies: dict[str, Tensor] = {}
        for index, (state, routing) in enumerate(self.states(hidden, embed, documents=documents)):
            total, cross_entropies[f"multi_token_{index + 1}"] = head.cross_entropy(state, later.targets[index])
            objective = objective + self.loss_weight / self.depth * later.scales[index] * total
            if routing is not None and self.loss_weight > 0.0:
                objective = objective + head.summed_router_loss(routing)
        return LaterLosses(objective, cross_entropies)

    def later_head(
        self,
        later: LaterTokens,
        embedding: InputEmbedding,
        fetched: FetchedRows | None,
        head: OutputHead,
        documents: Documents | None = None,
    ) -> LaterHead:
        """The losses of a micro-batch as the head takes them. fetched: the rows of s_lookup positions and of D more."""

        def embed(depth: int) -> Tensor:
            # outside of the layers, so that ZeRO 3 gathers the weights of the embedding when the embedding is called
            rows = None if fetched is None else fetched.positions(depth, fetched.slots.shape[-2] - self.depth)
            embedded: Tensor = embedding(later.inputs[depth - 1], rows)
            return embedded

        return lambda normed, _: self.losses(normed, later, embed, head, documents)
