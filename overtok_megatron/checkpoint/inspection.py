"""What `overtok checkpoint inspect` prints."""

from pathlib import Path

from overtok_megatron.checkpoint.layout import CheckpointLayout, LayoutKind
from overtok_megatron.checkpoint.store import read_manifest
from overtok_megatron.checkpoint.table_file import TableFile
from overtok_megatron.config.counts import parameter_counts
from overtok_megatron.config.schema import RunConfig


def describe_checkpoint(path: Path) -> str:
    """Step, layout, parameters and files of a checkpoint folder as text. Raises CheckpointError where a file is missing."""
    manifest = read_manifest(path)
    config = RunConfig.model_validate(manifest.config)
    count = parameter_counts(config)
    table_files = filter(None, map(TableFile.parse, manifest.files))
    increments = {file.increment for file in table_files if not file.is_full}
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
        sizes = [size for name, (size, _) in manifest.files.items() if name.split("/")[0] == folder]
        rows.append((folder, f"{len(sizes)} files, {sum(sizes):,} bytes"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _describe_layout(layout: CheckpointLayout) -> str:
    if layout.kind is LayoutKind.WHOLE:
        return "none: written anew, whole parameters"
    if layout.kind is LayoutKind.WEIGHTS_ONLY:
        return "none: weights only, whole parameters"
    sizes = {"pipeline": layout.pipeline, "data": layout.data, "context": layout.context, "tensor": layout.tensor}
    return f"{' x '.join(f'{size} {axis}' for axis, size in sizes.items())}, ZeRO {layout.zero_stage}"
