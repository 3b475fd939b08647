"""What `overtok checkpoint inspect` prints."""

from pathlib import Path

from overtok_megatron.checkpoint.layout import CheckpointLayout, LayoutKind
from overtok_megatron.checkpoint.store import read_manifest
from overtok_megatron.checkpoint.table_file import TableFile
from overtok_megatron.config.counts import parameter_counts
from overtok_megatron.config.schema import RunConfig


def describe(path: Path) -> str:
    """Step, layout, parameters and files of a checkpoint folder as text. Raises CheckpointError where one is missing."""
    manifest = read_manifest(path)
    config = RunConfig.model_validate(manifest.config)
    count = parameter_counts(config)
    increments = {file.increment for name in manifest.files if (file := TableFile.parse(name)) and not file.is_full}
    rows = [
        ("checkpoint", str(path)),
        ("step", f"{manifest.step:,} ({manifest.consumed_samples:,} samples)"),
        ("layout", _describe_layout(manifest.layout)),
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


def _describe_layout(layout: CheckpointLayout) -> str:
    if layout.kind is LayoutKind.WHOLE:
        return "none: written anew, whole parameters"
    if layout.kind is LayoutKind.WEIGHTS_ONLY:
        return "none: weights only, whole parameters"
    axes = ("pipeline", "data", "context", "tensor")
    sizes = " x ".join(f"{getattr(layout, axis)} {axis}" for axis in axes)
    return f"{sizes}, ZeRO {layout.zero_stage}"
