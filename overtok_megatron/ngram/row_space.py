"""How many rows the n-gram tables have, where each row lies, and which rank owns which. Pure arithmetic.

All tables are one row space: table s of a group has `table_rows + 2 s` rows, and `kernels.rows.place` deals the rows of all
tables over it, so that ranks, which own contiguous ranges of it, have equal shares of the look-ups. Whether a table size
makes the hash collide more than it must is judged in `overtok_megatron.config.collisions`.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from overtok_megatron.kernels.rows import place, table_rows_at

STRIPES = 4099  # prime, so that every stripe has rows of every table; many, so that every rank has several


@dataclass(frozen=True)
class TableGroup:
    """Tables that came together: `num_slices` for each of `orders`, one order after the other.

    table_rows: m >= 1, rows of the first. frozen: their rows take no update.
    """

    orders: tuple[int, ...]
    num_slices: int
    table_rows: int
    frozen: bool = False

    @property
    def num_tables(self) -> int:
        return len(self.orders) * self.num_slices

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each table: m + 2 s, so that the slices of an order hash differently."""
        return tuple(self.table_rows + 2 * s for s in range(self.num_tables))

    @property
    def table_orders(self) -> tuple[int, ...]:
        """The n-gram length that each table hashes."""
        return tuple(order for order in self.orders for _ in range(self.num_slices))


@dataclass(frozen=True)
class RowSpace:
    """The tables of an over-encoder laid end to end (paper section 3.2: orders 2..n, k slices each), then those added.

    ngram_order: n >= 2, the longest n-gram of the base tables. num_slices: k >= 1, base tables per order. table_rows: m >= 1,
    rows of table 0. width: values per row, of every table. added: tables that a trained model got later. frozen: rows of the
    base tables take no update.
    """

    ngram_order: int
    num_slices: int
    table_rows: int
    width: int
    added: tuple[TableGroup, ...] = ()
    frozen: bool = False

    @cached_property
    def groups(self) -> tuple[TableGroup, ...]:
        orders = tuple(range(2, self.ngram_order + 1))
        return TableGroup(orders, self.num_slices, self.table_rows, self.frozen), *self.added

    @property
    def num_base_tables(self) -> int:
        return self.groups[0].num_tables

    @property
    def num_tables(self) -> int:
        return len(self.sizes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each table."""
        return tuple(size for group in self.groups for size in group.sizes)

    @cached_property
    def orders(self) -> tuple[int, ...]:
        """The n-gram length that each table hashes."""
        return tuple(order for group in self.groups for order in group.table_orders)

    @property
    def longest(self) -> int:
        """The longest n-gram of all tables: one token more than the history that decoding keeps."""
        return max(self.orders)

    def places(self, table: int, rows: Tensor | None = None) -> Tensor:
        """Where rows [..] int64 of a table (None = all of them) lie in the row space."""
        return place(table, torch.arange(self.sizes[table]) if rows is None else rows, self.sizes, STRIPES)

    def rows_at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `places`: which table and which of its rows lie at places [..] int64 of the row space."""
        return table_rows_at(places, self.sizes, STRIPES)

    @property
    def any_frozen(self) -> bool:
        return any(group.frozen for group in self.groups)

    def trained_at(self, places: Tensor) -> Tensor:
        """Whether rows at places [..] int64 take updates, bool [..]; by arithmetic, without memory a row."""
        tables, _ = self.rows_at(places)
        flags = [not group.frozen for group in self.groups for _ in range(group.num_tables)]
        return torch.tensor(flags, device=places.device)[tables]

    @property
    def total_rows(self) -> int:
        return sum(self.sizes)

    def order_of(self, table: int) -> int:
        """The n-gram length that a table hashes: 2 for the first k tables, then 3, ..."""
        return self.orders[table]


def row_bounds(total_rows: int, num_ranks: int) -> tuple[int, ...]:
    """Where each rank's rows begin, and the end: `num_ranks + 1` ascending numbers.

    Base + remainder: the first `total_rows % num_ranks` ranks own one row more. No padding rows; a rank may own none.
    """
    base, remainder = divmod(total_rows, num_ranks)
    return tuple(rank * base + min(rank, remainder) for rank in range(num_ranks + 1))
