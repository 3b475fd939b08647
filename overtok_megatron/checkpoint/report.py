"""What `overtok checkpoint inspect` prints."""

from pathlib import Path

from overtok_megatron.checkpoint.engine_state import WEIGHTS_ONLY, WHOLE
from overtok_megatron.checkpoint.store import read_manifest
from overtok_megatron.config.counts import parameter_counts
from overtok_megatron.config.schema import RunConfig


def describe(path: Path) -> str:
    """Step, layout, parameters and files of a checkpoint folder as text. Raises CheckpointError where one is missing."""
    manifest = read_manifest(path)
    config, layout = RunConfig.model_validate(manifest.config), manifest.layout
    count = parameter_counts(config)
    if layout["zero_stage"] == WHOLE:
        written_by = "none: written anew, whole parameters"
    elif layout["zero_stage"] == WEIGHTS_ONLY:
        written_by = "none: weights only, whole parameters"
    else:
        axes = ("pipeline", "data", "context", "tensor")
        sizes = " x ".join(f"{layout[f'{axis}_parallel_size']} {axis}" for axis in axes)
        written_by = f"{sizes}, ZeRO {layout['zero_stage']}"
    increments = {name.split("-")[1] for name in manifest.files if name.startswith("tables/changed-")}
    rows = [
        ("checkpoint", str(path)),
        ("step", f"{manifest.step:,} ({manifest.consumed_samples:,} samples)"),
        ("layout", written_by),
        ("precision", config.training.precision),
        ("parameters, dense", f"{count.dense:,}"),
        ("parameters, n-gram tables", f"{count.tables:,}"),
        ("increments of the tables", str(len(increments))),
        ("tokenizer, SHA-256", manifest.tokenizer_fingerprint),
    ]
    for folder in sorted({name.split("/")[0] for name in manifest.files}):
        sizes_of = [size for name, (size, _) in manifest.files.items() if name.split("/")[0] == folder]
        rows.append((folder, f"{len(sizes_of)} files, {sum(sizes_of):,} bytes"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
