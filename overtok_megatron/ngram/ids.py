"""Token ids to row ids by the polynomial hash, from tokens, history and boundaries alone, for any layout (contract C1).

The n-gram id of position t is x_t + x_{t-1} p + ... + x_{t-q+1} p^(q-1), taken modulo the rows of its table (paper
section 3.2). It is reduced at every Horner step: p^(q-1) overflows int64 from V = 100278 and q = 4 on.

Shapes: b batch (any number of leading axes), s sequence, n longest n-gram, T tables.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from overtok_megatron.kernels.rows import STRIPES, HashTables, RowKernels
from overtok_megatron.ngram.families import Readout
from overtok_megatron.ngram.row_space import RowFilter, RowSpace

MISSING = -1  # stands in token tensors for "no token here" (before a sequence begins, left padding)


@dataclass(frozen=True, kw_only=True)
class NgramHash:
    """The family of tables (families.py) that the paper's polynomial hash indexes.

    base: p of the polynomial, the true vocabulary size unless configured. pad_id: the token that stands for missing
    history. boundary: "reset" hides everything up to and including the last end-of-document token before t, "ignore"
    looks across documents. eod_id: that token. kernels: the implementation that runs.
    """

    space: RowSpace
    base: int
    pad_id: int
    boundary: Literal["reset", "ignore"]
    eod_id: int
    kernels: RowKernels = field(default_factory=RowKernels)
    seed_name: str = ""
    readout: Readout = "embedding"

    @property
    def total_rows(self) -> int:
        return self.space.total_rows

    @property
    def width(self) -> int:
        return self.space.width

    @property
    def orders(self) -> tuple[int, ...]:
        return self.space.orders

    @property
    def history_length(self) -> int:
        return self.space.longest - 1

    @property
    def trained_rows(self) -> RowFilter | None:
        return self.space.is_trained if self.space.any_frozen else None

    @cached_property
    def tables(self) -> HashTables:
        """The tables as the kernels take them."""
        return HashTables(
            orders=self.space.orders,
            sizes=self.space.sizes,
            base=self.base,
            pad_id=self.pad_id,
            reset=self.boundary == "reset",
            eod_id=self.eod_id,
            stripes=STRIPES,
        )

    def _extended(self, tokens: Tensor, history: Tensor | None) -> Tensor:
        """history [b, n-1] int64, MISSING where it is None, and tokens [b, s] int64 -> one after the other [b, n-1+s] int64."""
        reach = self.history_length
        if history is None:
            history = tokens.new_full((*tokens.shape[:-1], reach), MISSING)
        assert history.shape == (*tokens.shape[:-1], reach), (history.shape, tokens.shape)
        return torch.cat([history, tokens], dim=-1)

    def windows(self, tokens: Tensor, history: Tensor | None = None) -> list[Tensor]:
        """x_t, x_{t-1}, ..., x_{t-n+1} for every position, with pad_id where history is missing or hidden.

        tokens [b, s] int64, MISSING allowed; history [b, n-1] int64, the tokens before tokens[:, 0], None = missing.
        Returns n tensors [b, s] int64.
        """
        return self.kernels.windows(self._extended(tokens, history), self.tables)

    def row_ids(self, tokens: Tensor, history: Tensor | None = None) -> Tensor:
        """Row ids [b, s, T] int64 for tokens [b, s] int64 (history as in `windows`).

        Rows per table are below 2^31, which config validation ensures: no intermediate passes 2^62.
        """
        return self.kernels.ngram_row_ids(self._extended(tokens, history), self.tables)

    def with_kernels(self, kernels: RowKernels) -> "NgramHash":
        return replace(self, kernels=kernels)

    def collision_share(self, tokens: Tensor) -> float:
        row_ids = self.row_ids(tokens).flatten(0, -2)  # [b s, T]
        windows = [token.flatten() for token in self.windows(tokens)]
        shared = 0
        key = windows[0]
        for order in range(2, self.space.longest + 1):
            # numbered anew for each order, so that the pair (n-gram so far, one token more) fits int64
            _, key = torch.unique(key * (int(windows[order - 1].max()) + 1) + windows[order - 1], return_inverse=True)
            for table in (table for table, own in enumerate(self.space.orders) if own == order):
                _, row = torch.unique(row_ids[:, table], return_inverse=True)
                ngrams = int(key.max()) + 1
                pairs, uses = torch.unique(row * ngrams + key, return_counts=True)
                row_of_pair = pairs // ngrams
                ngrams_of_row = torch.bincount(row_of_pair)
                shared += int(uses[ngrams_of_row[row_of_pair] > 1].sum())
        return shared / row_ids.numel()
