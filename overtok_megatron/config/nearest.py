"""The number nearest to a wanted one that fits: what messages propose. Costs the square root of the sizes, or nothing."""

import math


def nearest_divisor(whole: int, wanted: int, *, multiple_of: int = 1) -> int | None:
    """The divisor of `whole` nearest to `wanted` among the multiples of `multiple_of`, the smaller of two; None without one.

    `whole` is at least 1; it costs its square root.
    """
    quotient, remainder = divmod(whole, multiple_of)
    if remainder:
        return None
    fitting = (
        multiple_of * divisor
        for low in range(1, math.isqrt(quotient) + 1)
        if quotient % low == 0
        for divisor in (low, quotient // low)
    )
    return min(fitting, key=lambda number: (abs(number - wanted), number))


def nearest_multiple(unit: int, wanted: int) -> int:
    """The multiple of `unit` nearest to `wanted`, the smaller of two, at least one `unit`."""
    return max(1, (2 * wanted + unit - 1) // (2 * unit)) * unit


def number_does(number: int | None) -> str:
    """A proposal as the end of a sentence."""
    return "no number does" if number is None else f"{number} does"
