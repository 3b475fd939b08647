"""`benchmark.py overhead`: whole runs of the quickstart's two models in turn, started as a user starts them."""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from overtok_megatron.launching.console import overtok_output
from overtok_megatron.run_folder import RunFolder

_WARM_UP = 10  # steps not counted


def _seconds_a_step(kind: str, options: argparse.Namespace, folder: Path) -> float:
    """Median seconds of a run's steps after the first."""
    config = Path(__file__).parent.parent / "configs" / f"quickstart_{kind}.yaml"
    overrides = {
        "data.train": options.data,
        "tokenizer.path": Path(options.data).with_name("tokenizer.model"),
        "data.validation": "null",
        "training.output_directory": folder,
        "training.train_tokens": "null",
        "training.train_iters": options.steps,
    }
    changed = [f"{key}={value}" for key, value in overrides.items()]
    overtok_output("train", config, "--processes", options.ranks, *changed)
    records = RunFolder(folder).read_metrics()
    return statistics.median(record["speed/step_seconds"] for record in records[_WARM_UP:])


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Step time of the over-encoded quickstart over the baseline's."""
    seconds: dict[str, list[float]] = {"baseline": [], "overtok": []}
    for turn in range(options.rounds):
        for kind, times in seconds.items():
            with tempfile.TemporaryDirectory() as scratch:
                times.append(_seconds_a_step(kind, options, Path(scratch) / "run"))
        print(f"round {turn + 1}: {seconds['overtok'][-1] / seconds['baseline'][-1]:.3f} x", flush=True)
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    return {"seconds": medians, "rounds": seconds, "ratio": medians["overtok"] / medians["baseline"]}
