"""Compare runs by what they recorded: a table of their last losses, and a picture of their loss curves."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from overtok_megatron.config.counts import ParameterCounts
from overtok_megatron.errors import DataError
from overtok_megatron.loss_metrics import perplexity, validation_losses
from overtok_megatron.run_folder import RunFolder

_WARM_STEPS = 5  # left out of medians: the first steps fill caches and buffers
_MARKS = "os^Dvp"


@dataclass(frozen=True, kw_only=True)
class RunCurve:
    """What a run has recorded. training and validation: (step, loss), in nats per token; validation by the names of its sets
    ("" = a set without a name). seconds: the median time of a step. memory: peak bytes on the first rank."""

    name: str
    directory: Path
    parameters: ParameterCounts
    training: list[tuple[int, float]]
    validation: dict[str, list[tuple[int, float]]]
    seconds: float
    tokens_per_second: float
    memory: float

    @property
    def ends(self) -> dict[str, float]:
        """The last loss of each validation set."""
        return {name: curve[-1][1] for name, curve in self.validation.items()}


def read_curve(name: str, directory: Path, parameters: ParameterCounts) -> RunCurve:
    """Read a run's metrics.jsonl. Raises DataError where there is none, or where it holds no validation loss.

    Sets that the run no longer had at its last validation are left out, because their last losses are of an earlier step.
    """
    path = RunFolder(directory).metrics
    if not path.is_file():
        raise DataError(f"{path}: no such file; train the run first")
    records = RunFolder(directory).read_metrics()
    validated = [(record["step"], losses) for record in records if (losses := validation_losses(record))]
    if not validated:
        raise DataError(f"{path}: holds no validation loss; set data.validation")
    validation = {
        name: [(step, losses[name]) for step, losses in validated if name in losses] for name in validated[-1][1]
    }
    warm = records[_WARM_STEPS:] or records
    return RunCurve(
        name=name,
        directory=directory,
        parameters=parameters,
        training=[(record["step"], record["train/loss"]) for record in records],
        validation=validation,
        seconds=statistics.median(record["speed/step_seconds"] for record in warm),
        tokens_per_second=statistics.median(record["speed/tokens_per_second"] for record in warm),
        memory=max(record["memory/peak_bytes"] for record in records),
    )


def table(runs: Sequence[RunCurve]) -> str:
    """A Markdown table, one row per run; step times relative to the first. Named validation sets have columns of their own."""
    names = _set_names(runs)
    header = [
        "",
        "dense parameters",
        "in tables",
        *(f"{name + ' ' if name else ''}{metric}" for name in names for metric in ("validation loss", "perplexity")),
        "tokens/s",
        "peak memory a rank",
        "step time",
    ]
    rows = [header, ["---"] * len(header)]
    for run in runs:
        ends = [run.ends.get(name) for name in names]
        rows.append(
            [
                run.name,
                f"{run.parameters.dense / 1e6:.2f} M",
                f"{run.parameters.tables / 1e6:.1f} M",
                *(cell for loss in ends for cell in _loss_cells(loss)),
                f"{run.tokens_per_second:,.0f}",
                f"{run.memory / 2**30:.2f} GiB",
                f"{run.seconds / runs[0].seconds:.2f} x",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def _set_names(runs: Iterable[RunCurve]) -> list[str]:
    """Names of all runs' validation sets, in the order of their first appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.validation))


def _loss_cells(loss: float | None) -> tuple[str, str]:
    """The cells of loss and perplexity; "-" for a set that the run does not have."""
    return ("-", "-") if loss is None else (f"{loss:.4f}", f"{perplexity(loss):.2f}")


def draw_curves(runs: Sequence[RunCurve], path: Path) -> None:
    """Draw the curves of all runs into one PNG: training thin, validation with marks, which differ between named sets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = _set_names(runs)
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    for index, run in enumerate(runs):
        color = f"C{index}"
        axes.plot(*zip(*run.training, strict=True), color=color, alpha=0.3, linewidth=0.8)
        for name, curve in run.validation.items():
            label = f"{run.name}: {name or 'validation'} {run.ends[name]:.3f}"
            mark = _MARKS[names.index(name) % len(_MARKS)]
            axes.plot(*zip(*curve, strict=True), color=color, marker=mark, markersize=4, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token (thin: training)")
    curves = [curve for run in runs for curve in (run.training, *run.validation.values())]
    losses = [loss for curve in curves for _, loss in curve if math.isfinite(loss)]
    if losses:  # a run that diverged may have no finite one
        axes.set_ylim(min(losses) - 0.1, min(losses) + 3.0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
