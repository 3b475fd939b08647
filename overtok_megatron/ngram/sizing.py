"""How many rows the n-gram tables have, where each row lies, and which rank owns which. Pure arithmetic.

All tables are one row space: table s has `table_rows + 2 s` rows, and `kernels.rows.place` deals the rows of all of them
over it, so that ranks, which own contiguous ranges of it, have equal shares of the look-ups. Whether a table size
makes the hash collide more than it must is judged in `overtok_megatron.config.collisions`.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from overtok_megatron.kernels.rows import place

STRIPES = 4099  # prime, so that every stripe has rows of every table; many, so that every rank has several


@dataclass(frozen=True)
class RowSpace:
    """The tables of an over-encoder laid end to end (paper section 3.2: orders 2..n, k slices each).

    ngram_order: n >= 2, the longest n-gram. num_slices: k >= 1, tables per order. table_rows: m >= 1, rows of table 0.
    width: values per row, hidden_size / ((n - 1) k).
    """

    ngram_order: int
    num_slices: int
    table_rows: int
    width: int

    @property
    def num_tables(self) -> int:
        return (self.ngram_order - 1) * self.num_slices

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each table: m + 2 s, so that the slices of an order hash differently."""
        return tuple(self.table_rows + 2 * s for s in range(self.num_tables))

    def places(self, table: int, rows: Tensor | None = None) -> Tensor:
        """Where rows [..] int64 of a table (None = all of them) lie in the row space."""
        return place(table, torch.arange(self.sizes[table]) if rows is None else rows, self.sizes, STRIPES)

    @property
    def total_rows(self) -> int:
        return sum(self.sizes)

    def order_of(self, table: int) -> int:
        """The n-gram length that a table hashes: 2 for the first k tables, then 3, ..."""
        return 2 + table // self.num_slices


def row_bounds(total_rows: int, num_ranks: int) -> tuple[int, ...]:
    """Where each rank's rows begin, and the end: `num_ranks + 1` ascending numbers.

    Base + remainder: the first `total_rows % num_ranks` ranks own one row more. No padding rows; a rank may own none.
    """
    base, remainder = divmod(total_rows, num_ranks)
    return tuple(rank * base + min(rank, remainder) for rank in range(num_ranks + 1))
