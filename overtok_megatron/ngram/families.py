"""Families of n-gram tables: how row ids are made from tokens, and where the rows that they name are read out.

The store of rows, its exchange and its optimizer (sharded_tables.py) know a family by the protocol below alone, so that in
this folder a second way of hashing, with rows of another width, is one more class. `NgramHash` in ids.py is the family that
models have today. Each family has a row space, and tables, of its own.

Outside this folder a second family needs what is not there yet: a section of the configuration beside `over_encoding`, from
which its tables are stored and updated (today `building.build_family_tables` reads that one section for every family); a
place in the model that reads it out (`Readout` has one value, and model/embedding.py joins one set of rows); a folder of its
own in checkpoints (checkpoint/tables.py writes one row space); an engine that steps several `ShardedTables` and adds up their
norms (training/engine.py holds one); and its form in the exported modelling file (interchange/modeling_overtok.py).
"""

from typing import Literal, Protocol

from torch import Tensor

from overtok_megatron.kernels.rows import RowKernels
from overtok_megatron.ngram.row_space import RowFilter

Readout = Literal["embedding"]  # joined to the 1-gram embedding, before the first layer


class TableFamily(Protocol):
    """Tables whose row ids are made in one way.

    Row ids depend on tokens and their history alone (contract C1): never on micro-batches, ranks, padding to the left, or
    how many tokens a call brings.

    Shapes: b batch (any number of leading axes), s sequence, T tables.
    """

    @property
    def seed_name(self) -> str:
        """Tells the random numbers of this family, for initial rows and rounding, from those of others; empty for the first."""

    @property
    def readout(self) -> Readout:
        """Where in the model the rows are read."""

    @property
    def total_rows(self) -> int:
        """Size of the row space: row ids are 0 .. total_rows - 1."""

    @property
    def width(self) -> int:
        """Values per row."""

    @property
    def orders(self) -> tuple[int, ...]:
        """The n-gram order of each table, [T]."""

    @property
    def history_length(self) -> int:
        """How many tokens before a position its row ids depend on: the longest n-gram's, less one."""

    @property
    def trained_rows(self) -> RowFilter | None:
        """Which rows take updates; None = all."""

    def row_ids(self, tokens: Tensor, history: Tensor | None = None) -> Tensor:
        """Row ids int64 [b, s, T] of the n-grams that end at each of tokens int64 [b, s].

        history int64 [b, history_length]: the tokens before tokens[:, 0]; None = there are none. MISSING stands for no token.
        """

    def with_kernels(self, kernels: RowKernels) -> "TableFamily":
        """The same family, computed by other kernels: those of the host where tokens are hashed there."""

    def collision_share(self, tokens: Tensor) -> float:
        """Share of look-ups of tokens [b, s] whose row another n-gram among them uses too, over all tables, 0 to 1."""
