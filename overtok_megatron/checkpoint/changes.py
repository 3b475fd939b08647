"""Which keys of a configuration may differ between a checkpoint and the run that goes on from it; the rest are refused by name.

An allowed key takes effect from the first step, on every layout. A key is refused where it defines the model, where state in
the checkpoint depends on it, or where it was read only when the weights were made and would have no effect any more.
"""

from pathlib import Path
from typing import Any

from overtok_megatron.checkpoint.store import Manifest
from overtok_megatron.config.model_keys import MODEL_KEYS
from overtok_megatron.errors import CheckpointError

_NEW_RUN = "set another training.output_directory"
_FROM_WEIGHTS = "start a new run from it by training.initial_checkpoint"

# Of the run that is gone on with; a new run that takes only the weights may differ in them.
RUN_KEYS: dict[str, str] = {
    "training.precision": "the master weights are of that precision",
    "training.seed": "it is read when weights are made and rows are rounded",
    "model.init_std": "it is read when weights are made",
    "over_encoding.init_std": "it is read when rows are made",
    "over_encoding.optimizer": "the rows' state is of that optimizer",
    "data.seq_length": "the position in the data counts samples of that length",
}


def check_same_model(config: dict[str, Any], manifest: Manifest, path: Path, other_way: str = _NEW_RUN) -> None:
    """Raises CheckpointError naming the first key by which a config's model differs from the checkpoint's.

    other_way: what to do instead of changing the model.
    """
    for section, keys in MODEL_KEYS.items():
        for key in keys or config[section]:
            mine, theirs = (_shape_of(key, values[section].get(key)) for values in (config, manifest.config))
            if key == "init_std" or mine == theirs:
                continue
            if section == "over_encoding" and key != "enabled" and not config[section]["enabled"]:
                continue
            raise CheckpointError(
                f"{path}: of another model: {section}.{key} is {_shown(theirs)} there and {_shown(mine)} in this run; "
                f"set it to {_shown(theirs)}, or {other_way}"
            )


def check_continuable(config: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """Raises CheckpointError naming the first key by which a run of `config` cannot go on from a checkpoint of a run.

    Needs no process group: a run is refused before its ranks start.
    """
    check_same_model(config, manifest, path)
    for key, reason in RUN_KEYS.items():
        section, name = key.split(".")
        if section == "over_encoding" and not config[section]["enabled"]:
            continue
        _same(config, manifest, path, key, reason, _FROM_WEIGHTS if name != "seed" else _NEW_RUN)
    if config["training"]["train_tokens"] is not None:
        reason = "with train_tokens the progress of a run is counted in tokens"
        _same(config, manifest, path, "training.global_batch_size", reason, "write training.train_iters")
    if config["training"]["initial_checkpoint"] is not None:
        reason = "a run that has checkpoints of its own goes on from those"
        _same(config, manifest, path, "training.initial_checkpoint", reason, _NEW_RUN)


def _same(config: dict[str, Any], manifest: Manifest, path: Path, key: str, reason: str, other_way: str) -> None:
    section, name = key.split(".")
    mine = config[section][name]
    theirs = manifest.config[section].get(name, mine)  # a key that is younger than the checkpoint
    if mine != theirs:
        raise CheckpointError(
            f"{path}: {key} is {_shown(theirs)} there and {_shown(mine)} in this run, and cannot change: {reason}; "
            f"set it to {_shown(theirs)}, or {other_way}"
        )


def _shown(value: Any) -> str:
    """As YAML has it."""
    return "null" if value is None else str(value)


def _shape_of(key: str, value: Any) -> Any:
    """What of a key's value makes the model; whether added tables take updates does not."""
    if key == "added":
        return [{name: own for name, own in group.items() if name != "frozen"} for group in value or []]
    return value


# What decides how DeepSpeed lays out its files, beside the sizes in the manifest's layout.
_FILE_KEYS = ("parallel.offload_optimizer", "parallel.pipeline_partition", "training.kernels")


def same_engine_files(config: dict[str, Any], layout: dict[str, int], manifest: Manifest) -> bool:
    """Whether DeepSpeed's own files fit a run of `config` and `layout`; else they are read parameter by parameter."""
    pairs = [(config["deepspeed"], manifest.config.get("deepspeed", {})), (layout, manifest.layout)]
    for key in _FILE_KEYS:
        section, name = key.split(".")
        mine = config[section][name]
        pairs.append((mine, manifest.config[section].get(name, mine)))
    return all(mine == theirs for mine, theirs in pairs)
