"""Experiment trackers: where the metrics of a run go besides the run's own files of records.

To add a tracker, write a class with the methods of `Tracker` and append it in `training_trackers` (or `evaluation_trackers`);
its key goes into `LoggingConfig` (config/schema.py), its package among the optional ones of pyproject.toml.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from overtok_megatron.config.schema import LoggingConfig
from overtok_megatron.run_folder import RunFolder


class Tracker(Protocol):
    """Takes the metrics of one run, on its first rank."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` (name -> number) after optimizer step `step` (1, 2, ...)."""

    def close(self) -> None:
        """Write what is still in memory; nothing is recorded after that."""


class TensorBoard:
    """Writes TensorBoard's event files into a folder; the names of metrics are tags."""

    def __init__(self, folder: Path, *, purge_step: int | None = None, flush: bool = False) -> None:
        """purge_step: TensorBoard hides what was written before of this step and later ones. flush: whether each `write`
        reaches the file at once."""
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._flush = flush

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._flush:
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def training_trackers(logging: LoggingConfig, run: RunFolder, steps_done: int) -> list[Tracker]:
    """The trackers of a training run that `logging` asks for. steps_done: 0, or those before a resume."""
    trackers: list[Tracker] = []
    if logging.tensorboard:
        trackers.append(TensorBoard(run.tensorboard, purge_step=steps_done + 1))
    return trackers


def evaluation_trackers(run: RunFolder) -> list[Tracker]:
    """The trackers of `overtok evaluate --follow`, which scores few checkpoints, each of which is to be seen at once."""
    return [TensorBoard(run.evaluation_tensorboard, flush=True)]
