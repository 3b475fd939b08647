"""How many rows the n-gram tables have, and the row id of each. Pure arithmetic.

All tables share one row space: table s of a group has `table_rows + 2 s` rows, and `kernels.rows.row_id` interleaves the rows
of all tables over it. Ranks own contiguous ranges of the row space, and interleaving gives them equal shares of the look-ups.
Whether a table size makes the hash collide more than it must is judged in `overtok_megatron.config.collisions`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from overtok_megatron.kernels.rows import STRIPES, row_id, table_and_row_of

RowFilter = Callable[[Tensor], Tensor]  # row ids int64 [..] -> bool [..]


@dataclass(frozen=True)
class TableGroup:
    """Tables of one configuration entry: `num_slices` for each of `orders`, one order after the other.

    table_rows: m >= 1, rows of the first table. frozen: the rows take no updates.
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
        """The n-gram order of each table."""
        return tuple(order for order in self.orders for _ in range(self.num_slices))


@dataclass(frozen=True, kw_only=True)
class RowSpace:
    """The base tables of an over-encoder (paper section 3.2: orders 2..n, k slices each), then the tables added to them.

    ngram_order: n >= 2, the longest n-gram of the base tables. num_slices: k >= 1, base tables per order. table_rows: m >= 1,
    rows of table 0. width: values per row, the same for every table. added: tables that a trained model got later. frozen:
    rows of the base tables take no updates.
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
        """The n-gram order of each table."""
        return tuple(order for group in self.groups for order in group.table_orders)

    @property
    def longest(self) -> int:
        """The highest n-gram order of all tables."""
        return max(self.orders)

    def row_ids_of_table(self, table: int, rows: Tensor | None = None) -> Tensor:
        """Row ids of rows [..] int64 of a table; rows None = all rows of the table."""
        return row_id(table, torch.arange(self.sizes[table]) if rows is None else rows, self.sizes, STRIPES)

    def table_and_row_of(self, row_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `row_ids_of_table`: the table of each of row_ids [..] int64 and its row within the table."""
        return table_and_row_of(row_ids, self.sizes, STRIPES)

    @property
    def any_frozen(self) -> bool:
        return any(group.frozen for group in self.groups)

    def is_trained(self, row_ids: Tensor) -> Tensor:
        """Whether each of row_ids [..] int64 takes updates, bool [..]; by arithmetic, without memory per row."""
        tables, _ = self.table_and_row_of(row_ids)
        flags = [not group.frozen for group in self.groups for _ in range(group.num_tables)]
        return torch.tensor(flags, device=row_ids.device)[tables]

    @property
    def total_rows(self) -> int:
        return sum(self.sizes)
