"""Curves of made-up runs: what is read, the table that is printed, the picture that is drawn."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from overtok_megatron.config.counts import ParameterCounts
from overtok_megatron.errors import DataError
from overtok_megatron.reports.curves import RunCurve, draw_curves, read_curve, table

COUNTS = ParameterCounts(blocks=1_000_000, embedding=200_000, head=30_000, encoder=4_000, tables=25_600_000)


def record(step: int, **extra: float) -> dict[str, Any]:
    slow = 10.0 if step <= 5 else 0.5  # the first steps warm up
    return {
        "step": step,
        "train/loss": 5.0 - step / 10,
        "speed/step_seconds": slow + step / 1000,
        "speed/tokens_per_second": 1000.0 * step,
        "memory/peak_bytes": (3.0 if step == 7 else 2.0) * 2**30,
    } | {f"validation/{name}": value for name, value in extra.items()}


def write(folder: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(entry) + "\n" for entry in records)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


def made_up(folder: Path, end: float = 4.0, steps: int = 10) -> RunCurve:
    records = [record(step) for step in range(1, steps)] + [record(steps, loss=end)]
    records[3]["validation/loss"] = 4.75
    return read_curve(folder.name, write(folder, records), COUNTS)


def test_a_run_is_read(tmp_path: Path) -> None:
    curve = made_up(tmp_path / "run")
    assert curve.name == "run"
    assert curve.directory == tmp_path / "run"
    assert curve.training == [(step, 5.0 - step / 10) for step in range(1, 11)]
    assert curve.validation == {"": [(4, 4.75), (10, 4.0)]}
    assert curve.ends == {"": 4.0}
    assert curve.seconds == pytest.approx(0.508)  # the median of steps 6 to 10
    assert curve.tokens_per_second == 8000.0
    assert curve.memory == 3.0 * 2**30


def test_a_short_run_counts_all_its_steps(tmp_path: Path) -> None:
    assert made_up(tmp_path / "run", steps=5).seconds == pytest.approx(10.003)


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    records = [record(1, loss=4.5), record(2)]
    for cut in (1, 8, 25):
        write(tmp_path, records, json.dumps(record(3))[:cut])
        assert [step for step, _ in read_curve("run", tmp_path, COUNTS).training] == [1, 2]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; train the run first") as absent:
        read_curve("run", tmp_path / "nowhere", COUNTS)
    for index, records in enumerate(([], [record(1), record(2)])):
        write(tmp_path / str(index), records)
        with pytest.raises(DataError, match=r"holds no validation loss; set data\.validation") as caught:
            read_curve("run", tmp_path / str(index), COUNTS)
        assert str(tmp_path / str(index) / "metrics.jsonl") in str(caught.value)
    assert str(tmp_path / "nowhere" / "metrics.jsonl") in str(absent.value)
    assert "\n" not in str(absent.value)


def test_the_table(tmp_path: Path) -> None:
    first, second = made_up(tmp_path / "baseline"), made_up(tmp_path / "a-longer-name", 3.5, steps=30)
    lines = table([first, second]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1  # aligned
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(cells[1]) == {"-" * 3}
    assert cells[2] == ["baseline", "1.23 M", "25.6 M", "4.0000", f"{math.exp(4.0):.2f}", "8,000", "3.00 GiB", "1.00 x"]
    assert cells[3][0] == "a-longer-name"
    assert cells[3][3:6] == ["3.5000", f"{math.exp(3.5):.2f}", "18,000"]
    assert cells[3][-1] == f"{0.518 / 0.508:.2f} x"


def test_named_sets_have_columns_of_their_own(tmp_path: Path) -> None:
    ends = {"a/loss": 4.0, "b/loss": 3.0, "loss/loss": 2.0, "a/perplexity": 54.6}
    named = [record(1, **{"old/loss": 5.0, "a/loss": 4.5}), record(2), record(3, **ends)]
    curve = read_curve("named", write(tmp_path / "named", named), COUNTS)
    assert curve.validation == {"a": [(1, 4.5), (3, 4.0)], "b": [(3, 3.0)], "loss": [(3, 2.0)]}
    runs = [made_up(tmp_path / "plain"), curve]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table(runs).splitlines())
    assert header[3:7] == ["validation loss", "perplexity", "a validation loss", "a perplexity"]
    assert [len(row) for row in rows] == [len(header)] * 2
    assert rows[0][3:11] == ["4.0000", "54.60", "-", "-", "-", "-", "-", "-"]
    assert rows[1][3:11] == ["-", "-", "4.0000", "54.60", "3.0000", "20.09", "2.0000", "7.39"]
    draw_curves(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_picture(tmp_path: Path) -> None:
    runs = [made_up(tmp_path / "one"), made_up(tmp_path / "two", 3.5)]
    draw_curves(runs, tmp_path / "curves.png")
    content = (tmp_path / "curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[begin : begin + 4], "big") for begin in (16, 20))
    assert (width, height) == (960, 600)
    draw_curves(runs[:1], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes() != content


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_diverged_run_is_drawn(tmp_path: Path, loss: float) -> None:
    records = [record(1, loss=loss) | {"train/loss": loss}, record(2, loss=4.0), record(3, loss=loss)]
    draw_curves([read_curve("run", write(tmp_path, records), COUNTS)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
