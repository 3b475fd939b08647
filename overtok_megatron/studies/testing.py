"""Reads a study's test set: once for each finished cell, after everything has been chosen on validation text."""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from overtok_megatron.errors import DataError
from overtok_megatron.launching.console import overtok_output
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.studies.cells import Cell
from overtok_megatron.studies.results import append_records, read_results
from overtok_megatron.studies.study_file import Study


def read_tests(study: Study, cells: Sequence[Cell], prefix: Path, tell: Callable[[str], object]) -> None:
    """Add the loss on `prefix` to the lines of the cells that have none and whose last checkpoint is here.

    Raises DataError where a checkpoint cannot be scored.
    """
    for cell in cells:
        known = read_results(study.results).get(cell.fingerprint)
        if known is None or known.test is not None:
            continue
        if not RunFolder(cell.run).checkpoints.is_dir():
            tell(f"{cell.label}: {cell.run} holds no checkpoint; the test set is not read for it")
            continue
        try:
            scores = json.loads(overtok_output("evaluate", cell.run, "--data", prefix, "--json"))
        except subprocess.CalledProcessError as error:
            raise DataError(
                f"{cell.run}: overtok evaluate left with code {error.returncode}; see its error above"
            ) from None
        loss = float(scores["sets"][0]["loss"])
        append_records(study.results, [{"fingerprint": cell.fingerprint, "test": round(loss, 5)}])
        tell(f"{cell.label}: test {loss:.4f}")
