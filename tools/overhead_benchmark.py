"""`benchmark.py overhead`: whole runs of the quickstart's two models in turn, started as a user starts them."""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from gpu_checks.installation import device_name

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
    """Step time of the over-encoded quickstart over the baseline's: of each round, of the medians, and of the fastest runs.

    A round's two runs follow each other, the one or the other first in turn, because a machine may slow down with time.
    """
    seconds: dict[str, list[float]] = {"baseline": [], "overtok": []}
    ratios: list[float] = []
    for turn in range(options.rounds):
        for kind in sorted(seconds, reverse=turn % 2 == 1):
            with tempfile.TemporaryDirectory() as scratch:
                seconds[kind].append(_seconds_a_step(kind, options, Path(scratch) / "run"))
        baseline, overtok = (times[-1] for times in seconds.values())
        ratios.append(overtok / baseline)
        print(
            f"round {turn + 1}: baseline {1e3 * baseline:.1f} ms, over-encoded {1e3 * overtok:.1f} ms: {ratios[-1]:.3f} x",
            flush=True,
        )
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    ratio = medians["overtok"] / medians["baseline"]
    fastest = min(seconds["overtok"]) / min(seconds["baseline"])
    print(
        f"medians: baseline {1e3 * medians['baseline']:.1f} ms, over-encoded {1e3 * medians['overtok']:.1f} ms: {ratio:.3f} x;"
        f" fastest runs: {fastest:.3f} x; {device_name(options.device.type == 'cuda')}",
        flush=True,
    )
    return {
        "processor": device_name(options.device.type == "cuda"),
        "seconds": medians,
        "rounds": seconds,
        "ratios": ratios,
        "ratio": ratio,
        "ratio_of_fastest": fastest,
    }
