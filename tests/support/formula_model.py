"""The model from its formulas in float64: plain torch on named weights, with the n-gram rows of whole tables, and its heads.

Nothing of the package's numerics is used: every weight is read by its name. Dense feed-forwards and full attention only.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.config.derived import head_size, key_value_heads
from overtok_megatron.config.schema import RunConfig
from support.reference import python_ngram_row, table_kinds


class FormulaModel:
    """weights: our dense parameters by name, float64. tables: the rows of each n-gram table, float64; empty without tables."""

    def __init__(self, config: RunConfig, eod_id: int, weights: Mapping[str, Tensor], tables: list[Tensor]) -> None:
        self.config = config
        self.model = config.model
        self.eod_id = eod_id
        self.weights = weights
        self.tables = tables

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + self.model.norm_epsilon).sqrt()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [G, s] -> [G, s, d]; n-grams look back as far as these tokens go."""
        word = self.weights["embedding.word.weight"][tokens]
        if not self.tables:
            return word
        over = self.config.over_encoding
        projections = [name for name in self.weights if name.startswith("embedding.over_encoding.")]  # base, then added
        matrix = torch.cat([self.weights[name] for name in projections], dim=1)
        width = matrix.shape[1] // len(self.tables)
        ngrams = torch.zeros_like(word)
        for number, ((order, size, _), rows) in enumerate(zip(table_kinds(self.config), self.tables, strict=True)):
            base, reset = over.hash_base or self.model.vocab_size, over.boundary == "reset"
            ids = [
                [
                    python_ngram_row(line, t, order, base, size, over.pad_id, self.eod_id, reset)
                    for t in range(len(line))
                ]
                for line in tokens.tolist()
            ]
            ngrams = ngrams + rows[torch.tensor(ids)] @ matrix[:, number * width : (number + 1) * width].t()
        share = 1.0 / (1 + (over.ngram_order - 1) * over.num_slices)
        return {"sum": word + ngrams, "mean": (word + ngrams) * share, "scaled": word + ngrams * share}[over.combine]

    def block(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        pre = self.model.norm_placement == "pre"
        branch = self.attention(name, self.norm(f"{name}.attention_norm", x) if pre else x, mask)
        x = x + (branch if pre else self.norm(f"{name}.attention_norm", branch))
        branch = self.feed_forward(name, self.norm(f"{name}.mlp_norm", x) if pre else x)
        return x + (branch if pre else self.norm(f"{name}.mlp_norm", branch))

    def attention(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        size, shared = head_size(self.model), self.model.num_attention_heads // key_value_heads(self.model)
        q, k, v = (x @ self.weights[f"{name}.attention.qkv.{letter}_proj"].t() for letter in "qkv")
        if self.model.qk_norm == "full":
            q, k = self.norm(f"{name}.attention.q_norm", q), self.norm(f"{name}.attention.k_norm", k)
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (q, k, v))  # [G, heads, s, e]
        q, k = self.rotate(q), self.rotate(k)
        k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(size)
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(-2) @ self.weights[f"{name}.attention.o_proj.weight"].t()

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        frequencies = self.model.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
        )

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        gate, up = (x @ self.weights[f"{name}.mlp.gate_up.{which}_proj"].t() for which in ("gate", "up"))
        return (F.silu(gate) * up) @ self.weights[f"{name}.mlp.down_proj.weight"].t()

    def mask(self, tokens: Tensor) -> Tensor:
        """[G, 1, s, s] bool: which positions each position sees."""
        within = self.config.data.document_attention == "within"
        lines = [
            [[u <= t and not (within and self.eod_id in line[u:t]) for u in range(len(line))] for t in range(len(line))]
            for line in tokens.tolist()
        ]
        return torch.tensor(lines).unsqueeze(1)

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed over the positions that are scored."""
        output = "embedding.word" if self.model.tie_word_embeddings else "head.output"
        logits = hidden @ self.weights[f"{output}.weight"].t()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")

    def later_target(self, tokens: Tensor, length: int, ahead: int) -> Tensor:
        """[G, length]: the token `ahead` behind each position; IGNORE_INDEX where it is not scored.

        tokens [G, ..]: IGNORE_INDEX behind the end of the stream.
        """
        within = self.config.data.document_attention == "within"
        lines = [
            [IGNORE_INDEX if within and self.eod_id in line[t : t + ahead] else line[t + ahead] for t in range(length)]
            for line in tokens.tolist()
        ]
        return torch.tensor(lines)

    def main_hidden(self, tokens: Tensor) -> Tensor:
        """After the final norm, [G, s, d]."""
        x, mask = self.embed(tokens), self.mask(tokens)
        for index in range(self.model.num_layers):
            x = self.block(f"blocks.{index}", x, mask)
        return self.norm("head.norm", x)

    def multi_token_losses(self, tokens: Tensor, length: int, hidden: Tensor) -> list[Tensor]:
        """The mean cross entropy of each depth over the positions that it scores.

        tokens [G, >= length + 1 + D], IGNORE_INDEX behind the end of the stream; hidden: `main_hidden` of the first `length`.
        """
        losses, mask = [], self.mask(tokens[:, :length])
        known = torch.where(tokens == IGNORE_INDEX, 0, tokens)
        for depth in range(1, self.config.multi_token_prediction.depth + 1):
            name = f"multi_token.layers.{depth - 1}"
            embedding = self.embed(known[:, : length + depth])[:, depth:]
            parts = [self.norm(f"{name}.embedding_norm", embedding), self.norm(f"{name}.hidden_norm", hidden)]
            joined = torch.cat(parts, dim=-1) @ self.weights[f"{name}.projection.weight"].t()
            hidden = self.norm(f"{name}.norm", self.block(f"{name}.block", joined, mask))
            targets = self.later_target(tokens, length, depth + 1)
            scored = max(int((targets != IGNORE_INDEX).sum()), 1)
            losses.append(self.cross_entropy(hidden, targets) / scored)
        return losses
