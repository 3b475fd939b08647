"""A small study on disk, and results of groups without runs."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overtok_megatron.interchange.sample_text import SAMPLE_TEXT
from overtok_megatron.studies.cells import Group
from overtok_megatron.studies.comparing import GroupResults
from overtok_megatron.studies.results import Result
from support.config_faults import make

BASE = """
model: {vocab_size: 400, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_attention_heads: 2}
tokenizer: {path: unused}
data: {train: unused, seq_length: 8}
optimizer: {learning_rate: 3e-3, warmup_iters: 1}
training: {output_directory: unused, micro_batch_size: 2, global_batch_size: 4, train_iters: 6, validation_interval: 3,
           validation_batches: 2, num_threads: 1}
"""
STUDY = """
base: ../base.yaml
question: Does a very small model gain from n-gram tables?
corpus: {name: some, text: texts, made_by: python make.py}
baseline: plain
variants:
  plain: []
  over-encoded: [over_encoding.enabled=true, over_encoding.table_rows=4 x V, over_encoding.combine=sum]
pictures: [{kind: curves}, {kind: differences}, {kind: speedup}, {kind: touched}]
"""


def write_study(folder: Path, study: str = STUDY, name: str = "tiny") -> Path:
    """configs/base.yaml, configs/studies/NAME.yaml and texts/ in `folder`; returns the study's path relative to it."""
    path = Path("configs") / "studies" / f"{name}.yaml"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "base.yaml").write_text(BASE, encoding="utf-8")
    (folder / path).write_text(study, encoding="utf-8")
    lines = [line for line in SAMPLE_TEXT.splitlines() if line.strip()]
    for seed, part in enumerate(("train", "validation", "test")):
        (folder / "texts" / part).mkdir(parents=True, exist_ok=True)
        mixed = random.Random(seed).choices(lines, k=200)
        (folder / "texts" / part / "text.txt").write_text("\n".join(mixed), encoding="utf-8")
    return path


def group_results(
    variant: str,
    curves: Mapping[int, Sequence[tuple[int, float]]],
    axes: Sequence[tuple[str, Any]] = (),
    *,
    shared: int = 0,
    epochs: float = 1.0,
    touched: Sequence[tuple[int, float]] = (),
    **config: Any,
) -> GroupResults:
    """Finished cells of a group: by seed its validation curve. config: as `make` takes it."""
    results = {}
    for seed, curve in curves.items():
        record = {
            "validation": {"": [list(point) for point in curve]},
            "touched": [list(point) for point in touched],
            "epochs": epochs,
            "steps": curve[-1][0],
            "parameters": {"dense": 2_700_000, "tables": 0},
            "processor": "a processor",
            "torch": "2.13.0",
            "commit": "0123456789abcdef",
            "clean": True,
        }
        results[seed] = Result(fingerprint=f"{variant}{axes}{seed}", record=record)
    group = Group(variant=variant, axes=tuple(axes), shared=shared)
    return GroupResults(group=group, config=make(**config), by_seed=results)
