"""Table sizes for which the modulo hash collides more than a random hash, and good sizes nearby. Pure arithmetic.

The 2-gram id is x_t + x_{t-1} p. Where rows / p is close to an integer c, id mod rows hardly depends on more than
x_{t-1} mod c, and frequent n-grams share rows: at p = 128000, m = 12.8M (100.00) 72% of tokens share a row, at
12.9M + 1 (100.78) 21%. A common factor of m and p does no such harm.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

TOO_CLOSE = 0.05  # distance of rows / p from an integer below which sizes are refused; 0.13 was measured harmless
LARGEST_ROWS = 2**31 - 1  # of a table; beyond, hashing can overflow 64 bits
_SMALL = 40  # a base below which a bad zone may hold a single remainder
_GOLDEN = 0.6180339887498949  # the fraction that small integers approximate worst


@dataclass(frozen=True)
class CollisionProblem:
    """table: the first one whose size is bad; ratio: its rows / base; proposed_rows: a good m nearby, or None where
    every m has a bad table, or is too large."""

    table: int
    ratio: float
    proposed_rows: int | None


def collision_problem(table_rows: int, base: int, num_tables: int) -> CollisionProblem | None:
    """The first table of sizes table_rows + 2 s whose ids collide so, or None.

    Tables smaller than the base cannot tell 1-grams apart and are not judged.
    """
    table = _first_bad(table_rows, base, num_tables)
    if table is None:
        return None
    return CollisionProblem(table, (table_rows + 2 * table) / base, _propose(table_rows, base, num_tables))


def _first_bad(table_rows: int, base: int, num_tables: int) -> int | None:
    """The first table whose size is bad, in a number of steps that does not grow with the number of tables.

    Computed in integers, because a ratio of 2^31 rows would be rounded.
    """
    start = max(0, -(-(base - table_rows) // 2))  # the first table that is not smaller than the base
    remainder = (table_rows + 2 * start) % base
    if base < _SMALL:  # the bad zone may be so narrow that sizes step over it; they repeat after `base` tables
        steps = range(min(base, num_tables - start))
        found = next((start + step for step in steps if _is_bad((remainder + 2 * step) % base, base)), None)
    elif _is_bad(remainder, base):
        found = start
    else:  # the next bad remainder is the first above the good ones
        found = start + (_last_good(base) - remainder) // 2 + 1
    return found if found is not None and found < num_tables else None


def _is_bad(remainder: int, base: int) -> bool:
    return min(remainder, base - remainder) < TOO_CLOSE * base


def _first_good(base: int) -> int:
    return math.ceil(TOO_CLOSE * base)


def _last_good(base: int) -> int:
    return base - _first_good(base)


def _propose(table_rows: int, base: int, num_tables: int) -> int | None:
    """m at the golden fraction of the nearest integers; where the offsets 2 s do not leave room for it, the nearest."""

    def good(candidates: Iterable[int]) -> Iterator[int]:
        most = LARGEST_ROWS - 2 * (num_tables - 1)
        return (rows for rows in candidates if base <= rows <= most and _first_bad(rows, base, num_tables) is None)

    whole = max(1, round(table_rows / base))
    golden = (round((whole + step + _GOLDEN) * base) for step in (-1, 0))
    best = min(good(golden), key=lambda rows: abs(rows - table_rows), default=None)
    if best is not None:
        return best
    if base < _SMALL:  # sizes repeat with the base, so that one period on either side holds a good one if there is any
        nearby = (table_rows + sign * step for step in range(1, base + 1) for sign in (-1, 1))
    else:  # all tables lie between two bad zones, at their lower or at their upper end
        ends = (_first_good(base), _last_good(base) - 2 * (num_tables - 1))
        sizes = (period * base + end for period in range(max(1, whole - 2), whole + 2) for end in ends)
        nearby = (rows for rows in sorted(sizes, key=lambda rows: abs(rows - table_rows)))
    return next(good(nearby), None)
