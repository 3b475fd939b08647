"""Data and configurations on disk for whole runs, and what a run reported."""

import json
from dataclasses import dataclass
from pathlib import Path

CONFIG = """
model: {{vocab_size: 512, hidden_size: 32, intermediate_size: 48, num_layers: 2, num_attention_heads: 2}}
over_encoding: {{enabled: true, table_rows: 40_756, init_std: 0, combine: sum, optimizer: {optimizer}}}
tokenizer: {{path: {folder}/tokenizer.model}}
data: {{train: {folder}/train, validation: {folder}/validation, seq_length: 16}}
optimizer: {{learning_rate: 3e-3, warmup_iters: 2}}
training: {{output_directory: {output}, micro_batch_size: 4, global_batch_size: 16, train_iters: 12, validation_interval: 6}}
checkpoint: {{interval: 4, keep_last: 2}}
"""


@dataclass(frozen=True)
class Workspace:
    """Where a test's data lies, and where its runs go."""

    data: Path
    scratch: Path

    def config(self, name: str, optimizer: str = "adam") -> Path:
        """Write a configuration whose run goes to scratch/name."""
        path = self.scratch / f"{name}.yaml"
        path.write_text(
            CONFIG.format(folder=self.data, output=self.scratch / name, optimizer=optimizer), encoding="utf-8"
        )
        return path


def records(run: Path) -> list[dict[str, float]]:
    """What a run reported, one dictionary per step."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def losses(run: Path) -> list[tuple[float, float, float | None]]:
    """(step, training loss, validation loss) of every report."""
    return [(r["step"], r["train/loss"], r.get("validation/loss")) for r in records(run)]
