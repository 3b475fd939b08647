"""The plain module made of the list of layers: the form in which ZeRO trains a model, and in which it generates.

Shapes: b batch, s sequence, d hidden, T tables, V vocabulary.
"""

from torch import Tensor, nn

from overtok_megatron.model.attention import DecodeStep
from overtok_megatron.model.block import Block
from overtok_megatron.model.heads import InputEmbedding, OutputHead


class Transformer(nn.Module):
    """Embedding, blocks and head, called one after the other."""

    def __init__(self, embedding: InputEmbedding, blocks: list[Block], head: OutputHead) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def reset(self, seed: int, std: float) -> None:
        """Initial weights: each a slice of the full weight drawn from (seed, its name), whatever the layout."""
        self.embedding.reset(seed, std)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset(seed, std)
        self.head.reset(seed, std)

    def hidden(self, tokens: Tensor, slots: Tensor | None = None, decode: DecodeStep | None = None) -> Tensor:
        """tokens [b, s] int64, slots [b, s / ranks, T] -> the last hidden states, before the final norm."""
        x: Tensor = self.embedding(tokens, slots)
        for block in self.blocks:
            x = block(x, decode)
        return x

    def forward(
        self, tokens: Tensor, slots: Tensor | None, targets: Tensor, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Summed objective (with gradient) and summed cross entropy of a micro-batch, float32 scalars."""
        result: tuple[Tensor, Tensor] = self.head.loss(self.hidden(tokens, slots), targets, z_loss)
        return result

    def logits(self, tokens: Tensor, slots: Tensor | None = None, decode: DecodeStep | None = None) -> Tensor:
        """tokens [b, s] -> [b, s, V]."""
        return self.head.logits(self.hidden(tokens, slots, decode))
