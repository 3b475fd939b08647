"""How a study's pictures look: a title that says the finding, few lines, and names beside what they name."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GREY = "#7a7a7a"
# Okabe and Ito's colours, which people with any colour vision tell apart; without the yellow, which is faint on white.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_EARLY = 0.9  # of the longest line: one that ends before has its label where it ends
_LINE = 13.0  # points between the centres of two labels


def colors_of(count: int, grey: int | None = None) -> list[str]:
    """Colours for `count` things, again from the first after the last; the one at index `grey` is the baseline."""
    own = iter(range(count))
    return [GREY if index == grey else _COLORS[next(own) % len(_COLORS)] for index in range(count)]


def canvas(title: str, x: str, y: str, rows: int | None = None) -> tuple[Any, Any]:
    """(figure, axes), with room for labels on the right. rows: of a picture of bars, which is as high as they need."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 4.6 if rows is None else 1.7 + 0.5 * rows
    figure, axes = plt.subplots(figsize=(8.4, height), dpi=120, layout="constrained")
    # over the whole width: the axes are narrower by the names of bars, or by the labels of lines
    figure.suptitle("\n".join(textwrap.wrap(title, 84)), x=0.012, ha="left", fontweight="bold", fontsize=12.5)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) of each line to the right of the axes, at the height of y, or near it."""
    figure = axes.figure
    axes.autoscale_view()
    right = max(x for x, *_ in ends)
    for x, y, text, color in ends:
        if x < _EARLY * right:  # the line ends inside
            axes.plot([x], [y], "o", color=color, markersize=4)
            white = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}
            axes.annotate(
                text, (x, y), xytext=(6, 0), textcoords="offset points", color=color, va="center", fontsize=9.5, bbox=white
            )  # fmt: skip
    ends = [one for one in ends if one[0] >= _EARLY * right]
    points = axes.get_position().height * figure.get_figheight() * 72.0
    low, high = axes.get_ylim()
    order = sorted(range(len(ends)), key=lambda index: ends[index][1])
    wanted = [min(1.0, max(0.0, (ends[index][1] - low) / (high - low))) * points for index in order]
    for height, index in zip(spread(wanted, _LINE), order, strict=True):
        _, _, text, color = ends[index]
        axes.annotate(
            text, (1.0, height / points), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            color=color, va="center", fontsize=9.5, annotation_clip=False,
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights in ascending order, at least `gap` apart, as near to the wanted ones, in ascending order, as can be.

    Labels that would overlap form a block around the mean of what they want, and blocks that meet are joined.
    """
    blocks: list[list[float]] = []  # [sum of (wanted - offset in the block), labels]
    for height in wanted:
        blocks.append([height, 1])
        while len(blocks) > 1:
            (before, number), (total, count) = blocks[-2:]
            if before / number + number * gap <= total / count:
                break
            blocks[-2:] = [[before + total - count * number * gap, number + count]]
    return [total / count + place * gap for total, count in blocks for place in range(int(count))]


def save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, metadata={"Software": None})  # the same picture has the same bytes with any release
    plt.close(figure)
