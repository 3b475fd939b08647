"""The pictures of a study. Each says one thing, in its title; lines and dots are labelled where they are, without a legend."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from overtok_megatron.studies.cells import Group
from overtok_megatron.studies.comparing import (
    GroupResults,
    baseline_of,
    differences,
    fit_log,
    mean_curve,
    mean_of,
    speedups,
)
from overtok_megatron.studies.drawing import GREY, canvas, colors_of, label_ends, save
from overtok_megatron.studies.study_file import PictureSection, Study
from overtok_megatron.studies.tables import log_points, shown_groups

_SHOWN_FROM = 0.3  # of a run: curves begin here, because the first losses are far above the others


def draw_pictures(study: Study, groups: Sequence[GroupResults]) -> list[Path]:
    """Draw every picture of the study for which there are cells; returns the files, beside the study."""
    paths, before = [], Counter[str]()
    for picture in study.section.pictures:
        path = study.picture(picture.kind, before[picture.kind])
        before[picture.kind] += 1
        if _DRAW[picture.kind](study, picture, groups, path):
            paths.append(path)
    return paths


def short_labels(groups: Sequence[GroupResults]) -> dict[Group, str]:
    """Labels of groups without the parts that all of them have, or that only one variant could have."""
    own = {
        one.group: [part for part in one.group.axes if not all(part in other.group.axes for other in groups)]
        for one in groups
    }
    on_axes = {group.variant for group, axes in own.items() if axes}
    alone = len(on_axes) == 1 and not any(group.variant in on_axes for group, axes in own.items() if not axes)
    return {
        group: ", ".join(
            [
                *([] if axes and alone else [group.variant]),
                *(f"{key.rpartition('.')[2]} {value}" for key, value in axes),
            ]
        )
        for group, axes in own.items()
    }


def _gap(values: Sequence[float]) -> str:
    """A mean difference without its sign, with its standard error."""
    mean = mean_of(values)
    return f"{abs(mean.value):.3f}" + ("" if mean.error is None else f" ± {mean.error:.3f}")


def _change(slope: float) -> str:
    return f"{'falls' if slope < 0 else 'rises'} by {abs(slope):.3f}"


def _mean(group: GroupResults) -> float:
    return mean_of(list(group.losses.values())).value


def _log_fit(study: Study, picture: PictureSection, groups: Sequence[GroupResults], path: Path) -> bool:
    points = log_points(picture, groups)
    assert picture.x is not None
    key = picture.x.rpartition(".")[2]
    if not points:
        return False
    fits = {variant: fit_log([(x, _mean(group)) for x, group in own]) for variant, own in points.items()}
    best = next(((variant, fit) for variant, fit in fits.items() if fit is not None), None)
    title = f"Loss against {key}"
    if best is not None:
        name = f" of {best[0]}" if len(fits) > 1 else ""
        title = f"The loss{name} {_change(best[1].slope)} per tenfold {key} (R² = {best[1].r_squared:.2f})"
        if picture.paper_slope is not None:
            title += f"; in the paper it {_change(picture.paper_slope)}"
    figure, axes = canvas(title, f"{key}, logarithmic", "validation loss, nats per token")
    axes.set_xscale("log")
    ticks = {x: str(group.group.value(picture.x)) for own in points.values() for x, group in own}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    ends: list[tuple[float, float, str, str]] = []
    for (variant, own), color in zip(points.items(), colors_of(len(points)), strict=True):
        for seed in study.section.seeds if len(study.section.seeds) > 1 else ():  # a thin line for each
            of_seed = [(x, group.losses[seed]) for x, group in own if seed in group.losses]
            axes.plot(
                [x for x, _ in of_seed], [loss for _, loss in of_seed], "o-", color=color, alpha=0.3, markersize=4
            )
        axes.plot([x for x, _ in own], [_mean(group) for _, group in own], "o", color=color, markersize=8)
        fit, xs = fits[variant], [own[0][0], own[-1][0]]
        name = f"{variant}: " if len(points) > 1 else ""
        if fit is not None:
            ys = [fit.intercept + fit.slope * math.log10(x) for x in xs]
            axes.plot(xs, ys, color=color, linewidth=2)
            ends.append((xs[1], ys[1], f"{name}{fit.slope:+.3f} per x10", color))
        if fit is not None and picture.paper_slope is not None:
            middle = sum(math.log10(x) for x, _ in own) / len(own)
            height = fit.intercept + fit.slope * middle
            ys = [height + picture.paper_slope * (math.log10(x) - middle) for x in xs]
            axes.plot(xs, ys, ":", color=GREY, linewidth=1.5)
            ends.append((xs[1], ys[1], f"paper's slope {picture.paper_slope:+.3f}", GREY))
    right = max(x for own in points.values() for x, _ in own)
    for group in groups:
        if group.group.variant == study.section.baseline:
            axes.axhline(_mean(group), color=GREY, linewidth=1.5, linestyle="--")
            ends.append((right, _mean(group), f"{group.label} {_mean(group):.3f}", GREY))
    label_ends(axes, ends)
    save(figure, path)
    return True


def _curves(study: Study, picture: PictureSection, groups: Sequence[GroupResults], path: Path) -> bool:
    shown = shown_groups(picture, groups)
    if not shown:
        return False
    labels = short_labels(shown)
    common = set.intersection(*(set(one.by_seed) for one in shown))  # an unfinished study lacks seeds of some groups
    best = min(shown, key=lambda one: mean_of([one.losses[seed] for seed in common or one.losses]).value)
    title = f"{labels[best.group]} ends lowest, at {_mean(best):.3f}"
    baseline = baseline_of(best, groups, study.section.baseline)
    if baseline is not None and baseline.group != best.group and (own := differences(best, baseline)):
        side = "below" if mean_of(list(own.values())).value < 0 else "above"
        title += f": {_gap(list(own.values()))} {side} {baseline.group.variant}"
    figure, axes = canvas(title, "optimizer step", "validation loss, nats per token")
    ends, seen = [], []
    for group, color in zip(shown, _line_colors(study, shown), strict=True):
        curves = [result.validation for result in group.by_seed.values()]
        last = max(step for curve in curves for step, _ in curve)
        for curve in curves if len(curves) > 1 else ():
            axes.plot(*zip(*curve, strict=True), color=color, alpha=0.25, linewidth=1)
        mean = mean_curve(curves)
        axes.plot(*zip(*mean, strict=True), color=color, linewidth=2)
        seen += [loss for step, loss in mean if step >= _SHOWN_FROM * last or len(mean) == 1]
        ends.append((mean[-1][0], mean[-1][1], f"{labels[group.group]} {mean[-1][1]:.3f}", color))
    _limit(axes, seen)
    axes.set_xlim(_SHOWN_FROM * min(x for x, *_ in ends), max(x for x, *_ in ends))
    label_ends(axes, ends)
    save(figure, path)
    return True


def _epochs(study: Study, picture: PictureSection, groups: Sequence[GroupResults], path: Path) -> bool:
    lines: dict[tuple[str, Any], list[GroupResults]] = {}
    for group in shown_groups(picture, groups):
        rest = tuple(part for part in group.group.axes if part[0] != "epochs")
        lines.setdefault((group.group.variant, rest), []).append(group)
    if not lines:
        return False
    figure, axes = canvas(_epochs_title(study, groups), "epochs", "validation loss, nats per token")
    ends = []
    grey = next((index for index, (variant, _) in enumerate(lines) if variant == study.section.baseline), None)
    for ((variant, rest), own), color in zip(lines.items(), colors_of(len(lines), grey), strict=True):
        own = sorted(own, key=lambda group: group.epochs)
        for group in own:
            axes.plot(
                [group.epochs] * len(group.losses),
                list(group.losses.values()),
                "o",
                color=color,
                alpha=0.35,
                markersize=4,
            )
        axes.plot([group.epochs for group in own], [_mean(group) for group in own], "o-", color=color, linewidth=2)
        name = ", ".join([variant, *(f"{key.rpartition('.')[2]} {value}" for key, value in rest)])
        ends.append((own[-1].epochs, _mean(own[-1]), f"{name} {_mean(own[-1]):.3f}", color))
    numbers = sorted({round(group.epochs, 2) for own in lines.values() for group in own})
    if numbers[-1] > 3 * numbers[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
    axes.minorticks_off()
    label_ends(axes, ends)
    save(figure, path)
    return True


def _epochs_title(study: Study, groups: Sequence[GroupResults]) -> str:
    """Up to which number of epochs the best variant of the longest runs is below the baseline."""
    pairs = [
        (group.epochs, mean_of(list(differences(group, baseline).values())).value, group)
        for group, baseline in _pairs(study, PictureSection(kind="epochs"), groups)
    ]
    if not pairs:
        return "Loss against epochs"
    longest = max(epochs for epochs, _, _ in pairs)
    best = min((pair for pair in pairs if pair[0] == longest), key=lambda pair: pair[1])
    gaps = sorted((epochs, gap) for epochs, gap, group in pairs if group.group.variant == best[2].group.variant)
    name = best[2].group.variant
    if all(gap < 0 for _, gap in gaps):
        return f"{name} is below {study.section.baseline} at every length; at {longest:.3g} epochs by {-best[1]:.3f}"
    below = [epochs for epochs, gap in gaps if gap < 0]
    if not below:
        return f"{name} is above {study.section.baseline} at every length"
    lengths = ", ".join(f"{epochs:.3g}" for epochs in dict.fromkeys(below))
    end = f"at {longest:.3g} it is {abs(best[1]):.3f} {'below' if best[1] < 0 else 'above'}"
    return f"{name} is below {study.section.baseline} at {lengths} epochs; {end}"


def _speedup(study: Study, picture: PictureSection, groups: Sequence[GroupResults], path: Path) -> bool:
    rows = []
    pairs = _pairs(study, picture, groups)
    labels = short_labels([group for group, _ in pairs])
    for group, baseline in pairs:
        found = list(speedups(group, baseline).values())
        reached = [one for one in found if one is not None]
        value = mean_of(reached).value if len(reached) == len(found) else None
        rows.append((labels[group.group], value, reached))
    if not rows:
        return False
    fastest = max(rows, key=lambda row: row[1] or 0.0)
    title = f"No variant reaches the last loss of {study.section.baseline} with every seed"
    if fastest[1] is not None:
        title = f"{fastest[0]} reaches the last loss of {study.section.baseline} {fastest[1]:.2f} x sooner"
    figure, axes = canvas(title, f"steps of {study.section.baseline} over steps to the same loss", "", rows=len(rows))
    for index, (_, value, reached) in enumerate(rows):
        if value is None:
            axes.text(
                1.0, index, f"  not reached by {'any seed' if not reached else 'all seeds'}", va="center", color=GREY
            )
            continue
        axes.barh(index, value - 1.0, left=1.0, color=colors_of(1)[0], height=0.55)
        axes.plot(reached, [index] * len(reached), "o", color="black", alpha=0.5, markersize=4)
        axes.text(max(1.0, *reached), index, f"   {value:.2f} x", va="center", fontweight="bold")
    axes.axvline(1.0, color=GREY, linewidth=1.5)
    axes.set_xlim(1.0 - 0.02 * axes.get_xlim()[1], 1.0 + 1.2 * max(0.1, axes.get_xlim()[1] - 1.0))
    _rows(axes, [row[0] for row in rows])
    save(figure, path)
    return True


def _touched(study: Study, picture: PictureSection, groups: Sequence[GroupResults], path: Path) -> bool:
    shown = [one for one in shown_groups(picture, groups) if all(result.touched for result in one.by_seed.values())]
    if not shown:
        return False
    labels = short_labels(shown)
    curves = {one.group: mean_curve([result.touched for result in one.by_seed.values()]) for one in shown}
    shares = [curve[-1][1] for curve in curves.values()]
    span = f"{min(shares):.0%}" if len(shares) == 1 else f"{min(shares):.0%} to {max(shares):.0%}"
    figure, axes = canvas(
        f"Training updates {span} of the tables' rows", "optimizer step", "share of rows updated so far"
    )
    ends = []
    for one, color in zip(shown, colors_of(len(shown)), strict=True):
        curve = curves[one.group]
        axes.plot(*zip(*curve, strict=True), color=color, linewidth=2, marker="o", markersize=3)
        ends.append((curve[-1][0], curve[-1][1], f"{labels[one.group]} {curve[-1][1]:.0%}", color))
    axes.set_ylim(0.0, 1.0 if max(shares) > 0.5 else 1.1 * max(shares))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    label_ends(axes, ends)
    save(figure, path)
    return True


def _differences(study: Study, picture: PictureSection, groups: Sequence[GroupResults], path: Path) -> bool:
    pairs = _pairs(study, picture, groups)
    labels = short_labels([group for group, _ in pairs])
    rows = [(labels[group.group], list(differences(group, baseline).values())) for group, baseline in pairs]
    if not rows:
        return False
    best = min(rows, key=lambda row: mean_of(row[1]).value)
    side = "below" if mean_of(best[1]).value < 0 else "above"
    title = f"{best[0]} is best: {_gap(best[1])} {side} {study.section.baseline}"
    figure, axes = canvas(
        title, f"difference in loss from {study.section.baseline}, same seed (left: better)", "", rows=len(rows)
    )
    for index, (_, gaps) in enumerate(rows):
        mean = mean_of(gaps)
        color = colors_of(1)[0] if mean.value < 0 else colors_of(2)[1]
        axes.plot([0.0, mean.value], [index, index], color=color, linewidth=2)
        axes.plot(gaps, [index] * len(gaps), "o", color=color, alpha=0.35, markersize=5)
        axes.plot([mean.value], [index], "o", color=color, markersize=8)
        axes.annotate(
            f"{mean.value:+.3f}",
            (mean.value, index),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=color,
        )
    axes.axvline(0.0, color=GREY, linewidth=1.5)
    axes.margins(x=0.12)
    _rows(axes, [row[0] for row in rows])
    save(figure, path)
    return True


def _pairs(
    study: Study, picture: PictureSection, groups: Sequence[GroupResults]
) -> list[tuple[GroupResults, GroupResults]]:
    """(group, its baseline) of the groups that a picture shows and that have a seed in common with a baseline other than
    themselves."""
    found = []
    for group in shown_groups(picture, groups):
        baseline = baseline_of(group, groups, study.section.baseline)
        if baseline is not None and baseline.group != group.group and differences(group, baseline):
            found.append((group, baseline))
    return found


def _rows(axes: Any, labels: Sequence[str]) -> None:
    """Name the rows of a picture of bars, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.7)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _line_colors(study: Study, shown: Sequence[GroupResults]) -> list[str]:
    """One colour for the groups that differ on shared axes only, as in length; grey for those of the baseline."""
    kinds = [(one.group.variant, one.group.axes[one.group.shared :]) for one in shown]
    order = list(dict.fromkeys(kinds))
    grey = next((index for index, (variant, _) in enumerate(order) if variant == study.section.baseline), None)
    colors = dict(zip(order, colors_of(len(order), grey), strict=True))
    return [colors[kind] for kind in kinds]


def _limit(axes: Any, losses: Sequence[float]) -> None:
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        room = 0.05 * (max(finite) - min(finite)) or 0.05
        axes.set_ylim(min(finite) - room, max(finite) + room)


_DRAW: dict[str, Callable[[Study, PictureSection, Sequence[GroupResults], Path], bool]] = {
    "log_fit": _log_fit,
    "curves": _curves,
    "epochs": _epochs,
    "speedup": _speedup,
    "touched": _touched,
    "differences": _differences,
}
