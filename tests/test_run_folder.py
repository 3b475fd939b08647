"""The records in a run's folder: what was written comes back, and lines that a kill cut are left out."""

import json
from pathlib import Path

import pytest

from overtok_megatron.run_folder import RunFolder, read_records

RECORDS = [{"step": 1, "train/loss": 5.25}, {"step": 2, "train/loss": float("inf")}, {"step": 3, "name": "naïve"}]


def test_a_run_without_records_has_none(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "nowhere").read_metrics() == []
    assert RunFolder(tmp_path).read_evaluations() == []


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_cut_line_is_left_out(tmp_path: Path, cut: int) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    RunFolder(tmp_path).metrics.write_text("\n".join([*lines[:2], lines[2][:-cut]]))
    assert RunFolder(tmp_path).read_metrics() == RECORDS[:2]
    RunFolder(tmp_path).evaluations.write_text("\n".join([lines[0][:cut], *lines[1:], ""]))
    assert RunFolder(tmp_path).read_evaluations() == RECORDS[1:]


def test_lines_that_are_not_objects_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('7\n[1]\nnull\n"text"\n\n{"step": 1}\nnot JSON\n')
    assert read_records(tmp_path / "file") == [{"step": 1}]
