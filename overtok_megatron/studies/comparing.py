"""What the numbers of a study's cells say together: means over seeds, paired differences, fitted lines, speed-up."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.studies.cells import Cell, Group
from overtok_megatron.studies.results import Curve, Result


@dataclass(frozen=True, kw_only=True)
class GroupResults:
    """The finished cells of a group. config: of one of its seeds."""

    group: Group
    config: RunConfig
    by_seed: Mapping[int, Result]

    @property
    def label(self) -> str:
        return self.group.label

    @property
    def losses(self) -> dict[int, float]:
        """The last validation loss of each seed."""
        return {seed: result.loss for seed, result in self.by_seed.items()}

    def number(self, key: str) -> float:
        """The value of a numeric key in the resolved configuration, or of the pseudo-key epochs."""
        if key == "epochs":
            return self.epochs
        value: Any = self.config
        for part in key.split("."):
            value = getattr(value, part)
        return float(value)

    @property
    def epochs(self) -> float:
        return statistics.fmean(result.epochs for result in self.by_seed.values())


@dataclass(frozen=True)
class Mean:
    """A mean over seeds. error: its standard error, None for a single seed."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.4f}" if self.error is None else f"{self.value:.4f} ± {self.error:.4f}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """y = intercept + slope log10(x), by least squares. r_squared: the share of y's variance that it explains."""

    slope: float
    intercept: float
    r_squared: float


def grouped(cells: Sequence[Cell], results: Mapping[str, Result]) -> list[GroupResults]:
    """The finished cells by their groups, in the cells' order; groups without one are left out."""
    found: dict[Group, dict[int, Result]] = {}
    configs: dict[Group, RunConfig] = {}
    for cell in cells:
        if cell.fingerprint in results:
            configs.setdefault(cell.group, cell.config)
            found.setdefault(cell.group, {})[cell.seed] = results[cell.fingerprint]
    return [GroupResults(group=group, config=configs[group], by_seed=own) for group, own in found.items()]


def mean_of(values: Sequence[float]) -> Mean:
    """Of one or more values; the standard error is s / sqrt(n), with n - 1 in s."""
    value = statistics.fmean(values)
    return Mean(value, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)


def baseline_of(group: GroupResults, groups: Sequence[GroupResults], baseline: str | None) -> GroupResults | None:
    """The group of the variant `baseline` with the same values on the axes that all variants have; None where there is none."""
    return next(
        (one for one in groups if one.group.variant == baseline and one.group.shared_axes == group.group.shared_axes),
        None,
    )


def differences(group: GroupResults, baseline: GroupResults) -> dict[int, float]:
    """By seed: a group's last loss less that of the baseline's run of the same seed. Negative = the group is better."""
    return {seed: loss - baseline.losses[seed] for seed, loss in group.losses.items() if seed in baseline.losses}


def fit_log(points: Sequence[tuple[float, float]]) -> Line | None:
    """The line through (x, y), x above 0; None with fewer than two different x."""
    logs, values = [math.log10(x) for x, _ in points], [y for _, y in points]
    if len(set(logs)) < 2:
        return None
    slope, intercept = statistics.linear_regression(logs, values)
    constant = len(set(values)) == 1
    return Line(
        slope=slope, intercept=intercept, r_squared=1.0 if constant else statistics.correlation(logs, values) ** 2
    )


def step_that_reaches(curve: Curve, loss: float) -> float | None:
    """Where a validation curve first comes down to `loss`, interpolated between validations; None where it does not.

    A curve whose first point is below the loss already has come there by that step at the latest, which is returned.
    """
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = step, value
    return None


def speedups(group: GroupResults, baseline: GroupResults) -> dict[int, float | None]:
    """By seed: the baseline's steps over the steps in which the group reaches the baseline's last loss; None = it does not.

    Both runs have schedules of their own length, so the group still has a higher learning rate where it gets there.
    """
    found: dict[int, float | None] = {}
    for seed in group.by_seed:
        if seed in baseline.by_seed:
            last, loss = baseline.by_seed[seed].validation[-1]
            step = step_that_reaches(group.by_seed[seed].validation, loss)
            found[seed] = None if step is None else last / step
    return found


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over curves at the steps that all of them have."""
    common = set.intersection(*({step for step, _ in curve} for curve in curves))
    by_step = [dict(curve) for curve in curves]
    return [(step, statistics.fmean(one[step] for one in by_step)) for step in sorted(common)]
