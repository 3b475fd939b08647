"""Runs side by side: a table of their ends and a picture of their curves, from the records that they wrote."""

import contextlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overtok_megatron.config.counts import ParameterCounts
from overtok_megatron.errors import DataError

_WARM_STEPS = 5  # left out of medians: the first steps fill caches and buffers


@dataclass(frozen=True)
class RunCurve:
    """A run's records. training and validation: (step, loss) in nats a token; seconds: median of a step; memory: peak
    bytes of the first rank."""

    name: str
    directory: Path
    parameters: ParameterCounts
    training: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    seconds: float
    tokens_per_second: float
    memory: float


def read_curve(name: str, directory: Path, parameters: ParameterCounts) -> RunCurve:
    """Read a run's metrics.jsonl. Raises DataError where there is none, or no validation in it."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no such file; train the run first")
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a line cut by a kill
            records.append(json.loads(line))
    validation = [(record["step"], record["validation/loss"]) for record in records if "validation/loss" in record]
    if not validation:
        raise DataError(f"{path}: holds no validation loss; set data.validation")
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
    """A Markdown table, one row a run; step times relative to the first."""
    header = [
        "",
        "dense parameters",
        "in tables",
        "validation loss",
        "perplexity",
        "tokens/s",
        "peak memory a rank",
        "step time",
    ]
    rows = [header, ["---"] * len(header)]
    for run in runs:
        loss = run.validation[-1][1]
        rows.append(
            [
                run.name,
                f"{run.parameters.dense / 1e6:.2f} M",
                f"{run.parameters.tables / 1e6:.1f} M",
                f"{loss:.4f}",
                f"{math.exp(loss):.2f}",
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


def draw_curves(runs: Sequence[RunCurve], path: Path) -> None:
    """Both curves of every run as one PNG: training thin, validation with marks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    for index, run in enumerate(runs):
        color = f"C{index}"
        axes.plot(*zip(*run.training, strict=True), color=color, alpha=0.3, linewidth=0.8)
        end = run.validation[-1][1]
        label = f"{run.name}: validation {end:.3f}"
        axes.plot(*zip(*run.validation, strict=True), color=color, marker="o", markersize=4, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token (thin: training)")
    losses = [loss for run in runs for _, loss in run.validation + run.training if math.isfinite(loss)]
    if losses:  # a run that diverged has others than finite ones
        axes.set_ylim(min(losses) - 0.1, min(losses) + 3.0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
