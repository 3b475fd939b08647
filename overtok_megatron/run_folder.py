"""What lies in a run's folder, by name, and the one reader of its files of records.

| name | what it holds | written by |
| --- | --- | --- |
| `config.yaml` | the resolved configuration; what makes a folder a run's that was started | config/loading.py |
| `checkpoints/` | complete checkpoints, and `latest`, which names the newest of them | checkpoint/store.py |
| `tokenizer.json` or `tokenizer.model` | the tokenizer of the run | data/tokenizers/kept.py |
| `metrics.jsonl` | one record per reported step | training/reporting.py |
| `evaluations.jsonl` | one record per scored checkpoint | evaluation/following.py |
| `tensorboard/` | the same numbers as TensorBoard's events; those of evaluations in `tensorboard/evaluation/` | trackers.py |
| `traces/` | the profiler's traces of chosen steps | training/tracing.py |
| `skipped.jsonl` | one record per step without an update: its samples | training/skipped_steps.py |
| `STOP` | nothing; it asks the run to save and to leave, and the run then removes it (training/leaving.py) | the user |
| `.start-WORD` | while ranks start: that they all see this folder | launching/shared_folder.py |
| `train.log` | the log of the first rank, and what its host's watchdog says | training/entry.py, watching/watchdog.py |
| `hang-TIME.txt`, `death-TIME.txt` | what every rank did when one hung or died | watching/hang_report.py |
| `.lock`, `.lock.ranks` | who writes into the folder now | run_lock.py |

Checkpoints and configurations are read by the files that write them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
TOKENIZER_FILES = {
    "hugging_face": "tokenizer.json",
    "sentencepiece": "tokenizer.model",
}  # also in Hugging Face's folders


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's files, whether they exist or not, and their records."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def tokenizer(self, kind: str) -> Path:
        """kind: of the configuration's tokenizer section, one that has a file."""
        return self.path / TOKENIZER_FILES[kind]

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def evaluation_tensorboard(self) -> Path:
        """A folder of its own, since TensorBoard reads one writer per folder."""
        return self.tensorboard / "evaluation"

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    def start_token(self, token: str) -> Path:
        """token: a word of one start of the run."""
        return self.path / f".start-{token}"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped.jsonl"

    @property
    def stop(self) -> Path:
        return self.path / "STOP"

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of the reported steps, oldest first: `step` and numbers by name. Raises as `read_records` does."""
        return read_records(self.metrics)

    def read_evaluations(self) -> list[dict[str, Any]]:
        """The records of the scored checkpoints, oldest first. Raises as `read_records` does."""
        return read_records(self.evaluations)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line; none where there is no such file.

    A line that is not an object is left out: a kill may cut a line, and a run that goes on appends further ones.
    Raises OSError where the file cannot be read, ValueError where it is not UTF-8.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
