"""When the modulo hash collides more than it must, and a table size nearby that does not. Pure arithmetic.

The 2-gram id is x_t + x_{t-1} p. Where rows / p is close to an integer c, id mod rows hardly depends on more than
x_{t-1} mod c, and frequent n-grams fall together: at p = 128000, m = 12.8M (100.00) 72% of tokens share a row, at
12.9M + 1 (100.78) 21%. A common factor of m and p does no such harm.
"""

from collections.abc import Iterator
from dataclasses import dataclass

TOO_CLOSE = 0.05  # distance of rows / p from an integer below which sizes are refused; 0.13 was measured harmless
_GOLDEN = 0.6180339887498949  # the fraction that small integers approximate worst


@dataclass(frozen=True)
class CollisionProblem:
    """table: the first one whose size is bad; ratio: its rows / base; proposed_rows: a good m nearby, or None where
    the base is so small that every m has a bad table."""

    table: int
    ratio: float
    proposed_rows: int | None


def collision_problem(table_rows: int, base: int, num_tables: int) -> CollisionProblem | None:
    """The first table of sizes table_rows + 2 s that falls into the trap, or None.

    Tables smaller than the base cannot tell 1-grams apart and are not judged.
    """
    table = _first_bad(table_rows, base, num_tables)
    if table is None:
        return None
    return CollisionProblem(table, (table_rows + 2 * table) / base, _propose(table_rows, base, num_tables))


def _first_bad(table_rows: int, base: int, num_tables: int) -> int | None:
    for table in range(num_tables):
        rows = table_rows + 2 * table
        remainder = rows % base  # in integers: a ratio of 2^31 rows would round
        if rows >= base and min(remainder, base - remainder) < TOO_CLOSE * base:
            return table
    return None


def _propose(table_rows: int, base: int, num_tables: int) -> int | None:
    """m at the golden fraction of the nearest integers; where the offsets 2 s do not leave room for it, the nearest."""

    def good(candidates: Iterator[int]) -> Iterator[int]:
        return (rows for rows in candidates if rows >= base and _first_bad(rows, base, num_tables) is None)

    whole = max(1, round(table_rows / base))
    golden = (round((whole + step + _GOLDEN) * base) for step in (-1, 0))
    best = min(good(golden), key=lambda rows: abs(rows - table_rows), default=None)
    if best is not None:
        return best
    # Sizes repeat with period p, so that one period on either side holds a good one if there is any.
    return next(good(table_rows + sign * step for step in range(1, base + 1) for sign in (-1, 1)), None)
