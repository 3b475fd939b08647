"""What a run reports of its steps: records in `metrics.jsonl`, experiment trackers, log lines, and a progress bar."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from overtok_megatron.config.schema import RunConfig
from overtok_megatron.files import write_atomically
from overtok_megatron.loss_metrics import validation_losses
from overtok_megatron.run_folder import RunFolder
from overtok_megatron.trackers import Tracker, training_trackers

log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes the metrics of steps to `metrics.jsonl` in a run's folder (appended), and hands them to trackers.

    steps_done: how many steps the checkpoint has from which the run resumes, else 0. Records of later steps are removed, so
    that the file holds each step once.
    """

    def __init__(self, run: RunFolder, trackers: Sequence[Tracker], *, steps_done: int) -> None:
        self.path = run.metrics
        if self.path.exists():
            kept = [json.dumps(record) + "\n" for record in run.read_metrics() if record["step"] <= steps_done]
            write_atomically(self.path, "".join(kept))  # a kill here loses no record
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers = trackers

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record `values` (name -> number) after optimizer step `step` (1, 2, ...)."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class RunReport:
    """Reports the steps of a run, on its first rank."""

    def __init__(self, config: RunConfig, *, steps_done: int, total_steps: int, bar: bool) -> None:
        """steps_done: as in `MetricsWriter`. bar: whether the progress bar is drawn."""
        run = RunFolder(Path(config.training.output_directory))
        self._interval = config.logging.interval
        self._total_steps = total_steps
        trackers = training_trackers(config.logging, run, steps_done)
        self._records = MetricsWriter(run, trackers, steps_done=steps_done)
        self._bar = tqdm(
            total=total_steps, initial=steps_done, unit="step", desc=run.path.name, disable=not bar, dynamic_ncols=True
        )

    def step(self, done: int, values: dict[str, float]) -> None:
        """Report the metrics of the step that was the `done`th.

        Reported are the last step, those with a validation or with the times of all ranks, and else one per logging interval.
        """
        losses = validation_losses(values)
        rare = bool(losses) or "stragglers/late_rank" in values
        if done % self._interval == 0 or done == self._total_steps or rare:
            self._records.write(done, values)
            log.info(step_line(done, self._total_steps, values))
        for name, loss in losses.items():
            of_set = f" of {name}" if name else ""
            log.info("step %d/%d  validation loss%s %.4f", done, self._total_steps, of_set, loss)
        self._bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        self._records.close()


def step_line(step: int, total: int, values: dict[str, float]) -> str:
    """The column-aligned line of a step."""
    parts = [
        f"step {step:>{len(str(total))}}/{total}",
        f"loss {values['train/loss']:8.4f}",
        f"lr {values['train/learning_rate']:9.3e}",
        f"norm {values['train/grad_norm']:8.3f}",
        f"{values['speed/tokens_per_second']:9.0f} tok/s",
        f"{values['speed/tflops_per_rank']:7.2f} TFLOP/s",
        f"mfu {100 * values['speed/model_flops_utilisation']:5.1f}%",
    ]
    if "tables/unique_rows" in values:
        parts.append(f"rows {values['tables/unique_rows']:8.0f}")
    epochs = [f"{value:.3f}" for name, value in values.items() if name.startswith("data/epoch/")]
    if epochs:
        parts.append(f"epoch {' '.join(epochs)}")
    return "  ".join(parts)
