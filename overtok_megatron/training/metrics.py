"""What a run reports: one line a step, TensorBoard, a JSON-lines file, and the figures behind them. First rank only writes.

Units: seconds, tokens, bytes; losses in nats a token.
"""

import json
import logging
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from overtok_megatron.files import write_atomically
from overtok_megatron.run_folder import RunFolder

log = logging.getLogger(__name__)


def peak_memory(device: torch.device) -> int:
    """Largest memory that this process held so far, bytes: of the accelerator, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # of this program alone: getrusage begins with what the starting process held
        (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def over_ranks(value: float, operation: Any, device: torch.device) -> float:
    """Reduce one number over all ranks, which must all call this; device: of the run, whose backend reduces it."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=operation)
    return float(tensor)


class Reporter:
    """Writes step records of the first rank: `metrics.jsonl` (appended), TensorBoard events, and the log line.

    A resumed run truncates records from its first step on, so that the file holds each step once.
    """

    def __init__(self, directory: Path, *, tensorboard: bool, first_step: int) -> None:
        folder = RunFolder(directory)
        self.path = folder.metrics
        if self.path.exists():
            kept = [json.dumps(record) + "\n" for record in folder.read_metrics() if record["step"] <= first_step]
            write_atomically(self.path, "".join(kept))  # a kill here loses no record
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=first_step) if tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record `values` (name -> number; names are TensorBoard tags) after optimizer step `step` (1, 2, ...)."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


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
