"""What is known of finished cells: a line of JSON for each, in a file beside the study that is committed with it.

| key of a line | what |
| --- | --- |
| `fingerprint` | of the cell: configuration and data (cells.py) |
| `cell`, `variant`, `axes`, `seed`, `study` | what the study called it when it ran |
| `config`, `data` | the values that count, and the fingerprints of tokenizer and sets |
| `validation` | by set: [step, loss] of every validation |
| `train` | [step, mean loss up to it], at most 200 |
| `touched` | [step, share of the tables' rows updated so far] |
| `steps`, `tokens`, `epochs`, `parameters` | of the whole run |
| `commit`, `clean`, `processes`, `processor`, `torch`, `finished` | what computed it, and when |

A line with `fingerprint` and `test` alone adds the loss on the test set. The file is replaced as a whole, under a
lock, so that a kill cuts no line and two processes lose none.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from overtok_megatron.config.counts import parameter_counts
from overtok_megatron.config.derived import tokens_per_step, train_iters
from overtok_megatron.errors import DataError, InUseError
from overtok_megatron.files import write_atomically
from overtok_megatron.loss_metrics import validation_losses
from overtok_megatron.run_folder import RunFolder, read_records
from overtok_megatron.run_lock import RunLock
from overtok_megatron.studies.cells import Cell, what_counts
from overtok_megatron.studies.origin import Origin

Curve = list[tuple[int, float]]
_MOST_POINTS = 200  # of a training curve
_LOCK_SECONDS = 60.0  # that another process may take to write a line
_TOUCHED = "tables/touched_share"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished cell, as its line says. test: None = the test set has not been read."""

    fingerprint: str
    record: Mapping[str, Any] = field(repr=False)
    test: float | None = None

    @property
    def validation(self) -> Curve:
        """The validation curve; of a study with several sets, that of the first."""
        curves: Mapping[str, Curve] = self.record["validation"]
        return [(int(step), float(loss)) for step, loss in next(iter(curves.values()))]

    @property
    def loss(self) -> float:
        """The last validation loss, nats per token."""
        return self.validation[-1][1]

    @property
    def touched(self) -> Curve:
        return [(int(step), float(share)) for step, share in self.record["touched"]]

    @property
    def epochs(self) -> float:
        return float(self.record["epochs"])

    @property
    def parameters(self) -> Mapping[str, int]:
        found: Mapping[str, int] = self.record["parameters"]
        return found


def describe_result(cell: Cell, study: str, processes: int, origin: Origin) -> dict[str, Any]:
    """The line of a cell whose run is complete. Raises DataError where the run has recorded no validation loss, or
    one that is not finite. Steps that were left out (training.non_finite: skip) have no training loss."""
    config, folder = cell.config, RunFolder(cell.run)
    records = folder.read_metrics()
    validated = [(record["step"], losses) for record in records if (losses := validation_losses(record))]
    if not validated or validated[-1][0] != train_iters(config):
        raise DataError(f"{folder.metrics}: holds no validation loss of the last step; set data.validation")
    if not all(math.isfinite(loss) for _, losses in validated for loss in losses.values()):
        raise DataError(f"{folder.metrics}: holds a validation loss that is not finite; the run has diverged")
    training = [(record["step"], record["train/loss"]) for record in records if math.isfinite(record["train/loss"])]
    epochs = [value for key, value in records[-1].items() if key.startswith("data/epoch/")]
    count = parameter_counts(config)
    return {
        "fingerprint": cell.fingerprint,
        "study": study,
        "cell": cell.label,
        "variant": cell.group.variant,
        "axes": dict(cell.group.axes),
        "seed": cell.seed,
        "steps": train_iters(config),
        "tokens": train_iters(config) * tokens_per_step(config),
        "epochs": round(sum(epochs), 4),
        "parameters": {"blocks": count.blocks, "active": count.active, "dense": count.dense, "tables": count.tables},
        "validation": {
            name: [[step, round(losses[name], 5)] for step, losses in validated if name in losses]
            for name in validated[-1][1]
        },
        "train": thinned(training),
        "touched": [[record["step"], round(record[_TOUCHED], 5)] for record in records if _TOUCHED in record],
        "processes": processes,
        **asdict(origin),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": dict(cell.data),
        "config": what_counts(config),
    }


def thinned(curve: Sequence[tuple[int, float]], most: int = _MOST_POINTS) -> list[list[float]]:
    """At most `most` points: the means over equally many reports, each at the last step of its reports."""
    width = max(1, -(-len(curve) // most))
    parts = [curve[begin : begin + width] for begin in range(0, len(curve), width)]
    return [[part[-1][0], round(sum(loss for _, loss in part) / len(part), 5)] for part in parts]


def read_results(path: Path) -> dict[str, Result]:
    """The finished cells of a file by their fingerprints; of several lines of one cell the first counts.

    Raises DataError where a line is not one of these.
    """
    records: dict[str, dict[str, Any]] = {}
    tests: dict[str, float] = {}
    for record in _lines(path):
        fingerprint = record.get("fingerprint")
        if isinstance(fingerprint, str) and "validation" in record:
            records.setdefault(fingerprint, record)
        elif isinstance(fingerprint, str) and "test" in record:
            tests.setdefault(fingerprint, float(record["test"]))
        else:
            raise DataError(f"{path}: a line is not that of a finished cell: {json.dumps(record)[:80]}; remove it")
    return {key: Result(fingerprint=key, record=record, test=tests.get(key)) for key, record in records.items()}


def results_beside(path: Path) -> dict[str, Result]:
    """Finished cells of the other studies in a study's folder."""
    found: dict[str, Result] = {}
    for other in sorted(path.parent.glob("*.jsonl")):
        if other != path:
            found = read_results(other) | found
    return found


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file of results. Raises InUseError where another process holds the lock for a minute, DataError where the
    file cannot be written."""
    lock, deadline = RunLock(path.parent, "overtok study: recording a cell"), time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            lock.take()
            break
        except InUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    try:
        lines = [json.dumps(record, allow_nan=False) for record in [*_lines(path), *records]]
        write_atomically(path, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        lock.release()


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_records(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
