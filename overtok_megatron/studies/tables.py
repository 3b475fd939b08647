"""A study's report in Markdown: the question, each seed's losses, paired differences, fitted lines, and what computed them."""

from collections.abc import Sequence
from pathlib import Path

from overtok_megatron.studies.comparing import (
    GroupResults,
    baseline_of,
    differences,
    fit_log,
    mean_of,
    speedups,
)
from overtok_megatron.studies.study_file import PictureSection, Study

NOTHING = "-"


def report(study: Study, groups: Sequence[GroupResults], missing: Sequence[str], pictures: Sequence[Path]) -> str:
    """The whole report. missing: labels of cells that are not finished; pictures: files beside the report."""
    section = study.section
    parts = [f"# {study.name}", section.question]
    if section.paper:
        parts.append(f"The paper: {section.paper}")
    if not groups:
        parts.append("No cell is finished yet.")
    else:
        parts += ["Validation loss, nats per token, after the last step:", losses_table(study, groups)]
        if section.baseline is not None and any(one.group.variant != section.baseline for one in groups):
            parts += [
                f"Difference from `{section.baseline}` with the same seed (below 0: better), and speed-up: baseline's steps "
                "over steps to its last loss:",
                differences_table(study, groups),
            ]
        parts += [text for picture in section.pictures if (text := fit_sentence(picture, groups)) is not None]
        parts += [f"![{path.stem}]({path.name})" for path in pictures]
    if missing:
        parts.append("Not finished: " + "; ".join(missing) + ".")
    if groups:
        parts.append(provenance(groups))
    return "\n\n".join(parts) + "\n"


def losses_table(study: Study, groups: Sequence[GroupResults]) -> str:
    """A row per group: what it is, each seed's last loss, their mean, and the test loss where it has been read."""
    seeds = study.section.seeds
    tested = any(result.test is not None for group in groups for result in group.by_seed.values())
    rows = [
        ["", "dense parameters", "in tables", "steps", "epochs", *(f"seed {seed}" for seed in seeds), "mean ± s.e.",
         *(["test, mean ± s.e."] if tested else [])]
    ]  # fmt: skip
    for group in groups:
        some = next(iter(group.by_seed.values()))
        tests = [result.test for result in group.by_seed.values() if result.test is not None]
        rows.append(
            [
                group.label,
                f"{some.parameters['dense'] / 1e6:.2f} M",
                f"{some.parameters['tables'] / 1e6:.1f} M",
                f"{some.record['steps']:,}",
                f"{group.epochs:.2f}",
                *(f"{group.losses[seed]:.4f}" if seed in group.losses else NOTHING for seed in seeds),
                str(mean_of(list(group.losses.values()))),
                *([str(mean_of(tests)) if tests else NOTHING] if tested else []),
            ]
        )
    return markdown(rows)


def differences_table(study: Study, groups: Sequence[GroupResults]) -> str:
    """A row per group that is not the baseline's: each seed's paired difference, their mean, and the mean speed-up."""
    seeds = study.section.seeds
    rows = [["", *(f"seed {seed}" for seed in seeds), "mean ± s.e.", "speed-up"]]
    for group in groups:
        baseline = baseline_of(group, groups, study.section.baseline)
        if baseline is None or group.group == baseline.group:
            continue
        own = differences(group, baseline)
        rows.append(
            [
                group.label,
                *(f"{own[seed]:+.4f}" if seed in own else NOTHING for seed in seeds),
                signed_mean(list(own.values())) if own else NOTHING,
                speedup_cell(group, baseline),
            ]
        )
    return markdown(rows)


def signed_mean(values: Sequence[float]) -> str:
    mean = mean_of(values)
    return f"{mean.value:+.4f}" + ("" if mean.error is None else f" ± {mean.error:.4f}")


def speedup_cell(group: GroupResults, baseline: GroupResults) -> str:
    """The mean over seeds; in words where a seed does not reach the baseline's last loss."""
    found = list(speedups(group, baseline).values())
    reached = [one for one in found if one is not None]
    if not reached:
        return "not reached" if found else NOTHING
    text = f"{mean_of(reached).value:.2f} x"
    return text if len(reached) == len(found) else f"{text} ({len(reached)} of {len(found)} seeds)"


def log_points(picture: PictureSection, groups: Sequence[GroupResults]) -> dict[str, list[tuple[float, GroupResults]]]:
    """By variant: (x, group) of the groups on the picture's axis, by x."""
    assert picture.x is not None
    found: dict[str, list[tuple[float, GroupResults]]] = {}
    for group in shown_groups(picture, groups):
        if group.group.value(picture.x) is not None:
            found.setdefault(group.group.variant, []).append((group.number(picture.x), group))
    return {variant: sorted(points, key=lambda point: point[0]) for variant, points in found.items()}


def shown_groups(picture: PictureSection, groups: Sequence[GroupResults]) -> list[GroupResults]:
    """The groups of the variants that a picture shows."""
    return [one for one in groups if picture.variants is None or one.group.variant in picture.variants]


def fit_sentence(picture: PictureSection, groups: Sequence[GroupResults]) -> str | None:
    """The slope and R2 of a picture's fitted lines; None where it has none."""
    if picture.kind != "log_fit":
        return None
    sentences = []
    for variant, points in log_points(picture, groups).items():
        line = fit_log([(x, mean_of(list(group.losses.values())).value) for x, group in points])
        if line is not None:
            sentences.append(
                f"{variant}: the line through the means at {len(points)} values of `{picture.x}` has a slope of "
                f"{line.slope:+.4f} per factor of ten, R2 = {line.r_squared:.3f}."
            )
    if sentences and picture.paper_slope is not None:
        sentences.append(f"The paper's slope is {picture.paper_slope:+.4f}.")
    return " ".join(sentences) or None


def provenance(groups: Sequence[GroupResults]) -> str:
    """Which processors, releases of torch and commits computed the cells."""
    records = [result.record for group in groups for result in group.by_seed.values()]
    commits = sorted({str(record["commit"])[:10] for record in records})
    dirty = sum(not record["clean"] for record in records)
    parts = [
        f"{len(records)} runs on {', '.join(sorted({record['processor'] for record in records}))}",
        f"torch {', '.join(sorted({record['torch'] for record in records}))}",
        f"commit {', '.join(commits)}" + (f" ({dirty} with changes that are not committed)" if dirty else ""),
    ]
    return "; ".join(parts) + "."


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the header, columns as wide as their widest cell."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )
