"""What a study computes from its cells, against numpy; its table and its pictures."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from overtok_megatron.errors import ConfigError
from overtok_megatron.studies.comparing import (
    baseline_of,
    differences,
    fit_log,
    mean_curve,
    mean_of,
    speedups,
    step_that_reaches,
)
from overtok_megatron.studies.drawing import spread
from overtok_megatron.studies.pictures import draw_pictures, short_labels
from overtok_megatron.studies.results import thinned
from overtok_megatron.studies.study_file import Study, read_study
from overtok_megatron.studies.tables import report
from support.config_faults import OVER
from support.study_cases import group_results

FILE = """
base: base.yaml
question: What does it say?
paper: something else.
seeds: [1, 2, 3]
baseline: plain
axes: {epochs: [1, 4]}
variants:
  plain: []
  tables:
    axes: {over_encoding.table_rows: [128618, 400618, 1280618]}
pictures:
  - {kind: log_fit, x: over_encoding.table_rows, paper_slope: -0.0256}
  - {kind: curves}
  - {kind: epochs}
  - {kind: speedup}
  - {kind: touched}
  - {kind: differences}
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "numbers.yaml").write_text(FILE, encoding="utf-8")
    return read_study(tmp_path / "numbers.yaml")


def curve(last: float, steps: int = 400) -> list[tuple[int, float]]:
    return [(step, last + 2.0 * (1.0 - step / steps)) for step in range(100, steps + 1, 100)]


def results() -> list:
    """Seeds differ by more than variants do. At one epoch tables are better the larger they are, at four they are worse."""
    found = []
    for epochs in (1, 4):
        shared = [("epochs", epochs)]
        plain = {seed: curve(4.5 + 0.1 * seed - 0.2 * epochs) for seed in (1, 2, 3)}
        found.append(group_results("plain", plain, shared, shared=1, epochs=epochs))
        for rows in (128_618, 400_618, 1_280_618):
            gap = -0.03 * np.log10(rows / 1e4) if epochs == 1 else 0.02
            own = {seed: [(step, loss + gap + 0.002 * seed) for step, loss in plain[seed]] for seed in (1, 2)}
            axes = [*shared, ("over_encoding.table_rows", rows)]
            changes = OVER | {"over_encoding__table_rows": rows}
            touched = [(100, 1e4 / rows), (400, 3e4 / rows)]
            found.append(
                group_results("tables", own, axes, shared=1, epochs=epochs, touched=touched, **changes)  # type: ignore[arg-type]
            )
    return found


def test_means_and_lines_are_those_of_numpy() -> None:
    draw = random.Random(3)
    for count in (2, 3, 7):
        values = [draw.gauss(4.4, 0.05) for _ in range(count)]
        found = mean_of(values)
        assert found.value == pytest.approx(np.mean(values))
        assert found.error == pytest.approx(np.std(values, ddof=1) / np.sqrt(count))
        xs = [draw.uniform(1e3, 1e7) for _ in range(count)]
        line = fit_log(list(zip(xs, values, strict=True)))
        assert line is not None
        slope, intercept = np.polyfit(np.log10(xs), values, 1)
        assert (line.slope, line.intercept) == pytest.approx((slope, intercept))
        left = np.sum((np.array(values) - np.polyval([slope, intercept], np.log10(xs))) ** 2)
        assert line.r_squared == pytest.approx(1.0 - left / np.sum((values - np.mean(values)) ** 2))
    assert mean_of([4.4]).error is None
    assert fit_log([(10.0, 1.0), (10.0, 2.0)]) is None
    flat = fit_log([(10.0, 1.0), (100.0, 1.0)])
    assert flat is not None and flat.r_squared == 1.0


def test_a_line_through_exact_points_is_found() -> None:
    line = fit_log([(10.0**power, 2.6754 - 0.0256 * power) for power in range(4, 8)])
    assert line is not None
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((-0.0256, 2.6754, 1.0))


def test_differences_are_paired_by_seed_and_by_shared_axes() -> None:
    groups = results()
    worse = groups[-1]
    baseline = baseline_of(worse, groups, "plain")
    assert baseline is groups[4]
    assert differences(worse, baseline) == pytest.approx({1: 0.022, 2: 0.024})
    assert baseline_of(worse, groups[:4], "plain") is None


def test_where_a_curve_comes_to_a_loss() -> None:
    points = [(100, 5.0), (200, 4.6), (300, 4.7), (400, 4.4)]
    steps = np.linspace(100, 400, 30_001)
    values = np.interp(steps, *zip(*points, strict=True))
    for loss in (4.9, 4.6, 4.5, 4.41):
        assert step_that_reaches(points, loss) == pytest.approx(steps[np.argmax(values <= loss + 1e-12)], abs=0.02)
    assert step_that_reaches(points, 5.5) == 100
    assert step_that_reaches(points, 4.3) is None


def test_speed_up_is_that_of_the_same_seed() -> None:
    plain = group_results("plain", {1: curve(4.5), 2: curve(4.6)})
    faster = group_results("fast", {1: [(100, 5.0), (200, 4.5), (400, 4.4)], 2: [(100, 5.0), (400, 4.7)]})
    assert speedups(faster, plain) == {1: 2.0, 2: None}


def test_curves_are_averaged_where_all_have_points() -> None:
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(2, 6.0), (3, 1.0)]]) == [(2, 5.0)]


def test_thinned_curves_keep_their_mean_and_last_step() -> None:
    draw = random.Random(1)
    points = [(step, draw.random()) for step in range(1, 1001)]
    thin = thinned(points)
    assert len(thin) == 200
    assert thin[-1][0] == 1000
    assert np.mean([loss for _, loss in thin]) == pytest.approx(np.mean([loss for _, loss in points]), abs=1e-5)
    assert thinned(points[:7]) == [[step, round(loss, 5)] for step, loss in points[:7]]


def test_the_report_has_every_seed_and_says_what_is_missing(study: Study) -> None:
    text = report(study, results(), ["tables, seed 3"], [study.path.with_name("numbers-curves.png")])
    lines = text.splitlines()
    plain = next(line for line in lines if line.startswith("| plain, epochs 1 "))
    assert [cell.strip() for cell in plain.split("|")[6:10]] == ["4.4000", "4.5000", "4.6000", "4.5000 ± 0.0577"]
    worse = [line for line in lines if line.startswith("| tables, epochs 4, table_rows 1280618")]
    assert [cell.strip() for cell in worse[1].split("|")[2:7]] == [
        "+0.0220", "+0.0240", "-", "+0.0230 ± 0.0010", "not reached"]  # fmt: skip
    assert "slope of" in text
    assert "-0.0256" in text
    assert "Not finished: tables, seed 3." in text
    assert "![numbers-curves](numbers-curves.png)" in text
    assert "No cell is finished yet." in report(study, [], ["all"], [])


def test_every_picture_is_drawn_and_says_its_finding(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from overtok_megatron.studies import pictures

    titles = []
    real = pictures.canvas
    monkeypatch.setattr(
        pictures, "canvas", lambda title, *rest, **more: titles.append(title) or real(title, *rest, **more)
    )
    groups = results()
    drawn = draw_pictures(study, groups)
    assert [path.name for path in drawn] == [
        f"numbers-{kind}.png" for kind in ("log_fit", "curves", "epochs", "speedup", "touched", "differences")
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert "in the paper it falls by 0.026" in titles[0]
    assert titles[1] == "plain, epochs 4 ends lowest, at 3.900"
    assert titles[2] == "tables is below plain at 1 epochs; at 4 it is 0.023 above"
    assert "1280618 reaches the last loss of plain" in titles[3]
    assert titles[4] == "Training updates 2% to 23% of the tables' rows"
    assert "0.060 ± 0.001 below plain" in titles[5]
    assert draw_pictures(study, groups[:1]) == [study.picture(kind, 0) for kind in ("curves", "epochs")]


def test_labels_leave_out_what_all_groups_share() -> None:
    groups = results()
    assert list(short_labels(groups[:4]).values()) == [
        "plain", "table_rows 128618", "table_rows 400618", "table_rows 1280618"]  # fmt: skip
    assert short_labels(groups)[groups[5].group] == "tables, epochs 4, table_rows 128618"


@pytest.mark.parametrize("seed", range(20))
def test_labels_never_overlap_and_move_as_little_as_they_must(seed: int) -> None:
    draw = random.Random(seed)
    wanted = sorted(draw.uniform(0, 60) for _ in range(draw.randint(1, 9)))
    placed = spread(wanted, 10.0)
    assert all(above - below >= 10.0 - 1e-9 for below, above in pairwise(placed))
    assert sum(placed) == pytest.approx(sum(wanted))
    if all(above - below >= 10.0 for below, above in pairwise(wanted)):
        assert placed == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("baseline: plain", "baseline: plane"), ["numbers.yaml:6", "baseline: plane", "plain, tables"]),
        (("seeds:", "seed:"), ["numbers.yaml:5", "unknown key seed", "write seeds"]),
        (("kind: curves", "kind: lines"), ["numbers.yaml:12", "pictures.1.kind", "'lines'"]),
        (("question: What does it say?\n", ""), ["question is missing", "in a sentence"]),
        (("x: over_encoding.table_rows", "x: table_rows"), ["pictures.0.x", "over_encoding.table_rows"]),
        (("[1, 2, 3]", "[1, 2, 1]"), ["numbers.yaml:5", "seeds", "each seed once"]),
        (("plain: []", "plain: 3"), ["numbers.yaml:9", "variants.plain"]),
    ],
)
def test_mistakes_in_a_study_are_named(tmp_path: Path, change: tuple[str, str], parts: list[str]) -> None:
    assert change[0] in FILE
    (tmp_path / "numbers.yaml").write_text(FILE.replace(*change), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_study(tmp_path / "numbers.yaml")
    for part in parts:
        assert part in caught.value.lines[0], caught.value.lines
