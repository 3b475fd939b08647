"""When the modulo hash collides more than it must, and a table size nearby that does not. Pure arithmetic.

The 2-gram id is x_t + x_{t-1} p. Where rows / p is close to an integer c, id mod rows hardly depends on more than
x_{t-1} mod c, and frequent n-grams fall together: at p = 128000, m = 12.8M (100.00) 72% of tokens share a row, at
12.9M + 1 (100.78) 21%. A common factor of m and p does no such harm.
"""

from dataclasses import dataclass

TOO_CLOSE = 0.05  # distance of rows / p from an integer below which sizes are refused; 0.13 was measured harmless
_GOLDEN = 0.6180339887498949  # the fraction that small integers approximate worst


@dataclass(frozen=True)
class CollisionProblem:
    """table: the first one whose size is bad; ratio: its rows / base; proposed_rows: a good m nearby."""

    table: int
    ratio: float
    proposed_rows: int


def _distance(ratio: float) -> float:
    return abs(ratio - round(ratio))


def collision_problem(table_rows: int, base: int, num_tables: int) -> CollisionProblem | None:
    """The first table of sizes table_rows + 2 s that falls into the trap, or None.

    Tables smaller than the base cannot tell 1-grams apart and are not judged.
    """
    for table in range(num_tables):
        ratio = (table_rows + 2 * table) / base
        if ratio >= 1.0 and _distance(ratio) < TOO_CLOSE:
            return CollisionProblem(table, ratio, _propose(table_rows, base, num_tables))
    return None


def _propose(table_rows: int, base: int, num_tables: int) -> int:
    whole = max(1, round(table_rows / base))
    candidates = [round((whole + step + _GOLDEN) * base) for step in (-1, 0)]
    good = [
        rows
        for rows in candidates
        if rows >= base and all(_distance((rows + 2 * table) / base) >= TOO_CLOSE for table in range(num_tables))
    ]
    return min(good or candidates[-1:], key=lambda rows: abs(rows - table_rows))
