"""Which keys of a configuration may differ between a checkpoint and the run that continues it; the others are refused by name.

A changed key that is allowed takes effect from the first step, on every layout. A key is refused where it defines the model,
where state in the checkpoint depends on it, or where it is read only when weights are made and would have no effect any more.
"""

from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from overtok_megatron.checkpoint.layout import CheckpointLayout
from overtok_megatron.checkpoint.store import Manifest
from overtok_megatron.config.model_keys import MODEL_KEYS, OFF
from overtok_megatron.config.schema import RunConfig
from overtok_megatron.config.section import Section
from overtok_megatron.errors import CheckpointError

_NEW_RUN = "set another training.output_directory"
_FROM_WEIGHTS = "start a new run from its weights by training.initial_checkpoint"

# Keys that a run cannot change when it continues, with the reason. A new run that takes only the weights may differ in them.
RUN_KEYS: dict[str, str] = {
    "training.precision": "the master weights are of that precision",
    "training.train_only": "there is optimizer state of the weights that were trained only",
    "training.seed": "it is read when weights are made and rows are rounded",
    "model.init_std": "it is read when weights are made",
    "over_encoding.init_std": "it is read when rows are made",
    "over_encoding.optimizer": "the rows' state is of that optimizer",
    "data.seq_length": "the position in the data counts samples of that length",
}


def check_same_model(config: dict[str, Any], manifest: Manifest, path: Path, other_way: str = _NEW_RUN) -> None:
    """Raise CheckpointError naming the first key by which a config's model differs from the checkpoint's.

    other_way: what to do instead of changing the model.
    """
    for section, keys in MODEL_KEYS.items():
        for key in keys or config[section]:
            mine = _model_part(key, config[section][key])
            theirs = _model_part(key, _stored(manifest, section, key))
            if key == "init_std" or mine == theirs:
                continue
            if section in OFF and key != OFF[section][0] and _is_off(config, section):
                continue
            raise CheckpointError(
                f"{path}: of another model: {section}.{key} is {_shown(theirs)} there and {_shown(mine)} in this run; "
                f"set it to {_shown(theirs)}, or {other_way}"
            )


def check_continuable(config: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """Raise CheckpointError naming the first key because of which a run of `config` cannot continue its own checkpoint.

    This needs no process group: a run is refused before its ranks start.
    """
    check_same_state(config, manifest, path)
    if config["training"]["initial_checkpoint"] is not None:
        reason = "a run that has checkpoints of its own goes on from those"
        for key in ("training.initial_checkpoint", "training.initial_state"):
            _same(config, manifest, path, key, reason, _NEW_RUN)


def check_same_state(config: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """As `check_continuable`, of a run that goes on from the whole state of a checkpoint, its own or another run's."""
    check_same_model(config, manifest, path)
    for key, reason in RUN_KEYS.items():
        section, name = key.split(".")
        if section in OFF and _is_off(config, section):
            continue
        _same(config, manifest, path, key, reason, _FROM_WEIGHTS if name != "seed" else _NEW_RUN)
    if config["training"]["train_tokens"] is not None:
        reason = "with train_tokens the progress of a run is counted in tokens"
        _same(config, manifest, path, "training.global_batch_size", reason, "write training.train_iters")


def _is_off(config: dict[str, Any], section: str) -> bool:
    """Whether the model of a config has nothing of a section, so that its other keys do not matter."""
    key, value = OFF[section]
    return bool(config[section][key] == value)


def _same(config: dict[str, Any], manifest: Manifest, path: Path, key: str, reason: str, other_way: str) -> None:
    section, name = key.split(".")
    mine = config[section][name]
    theirs = manifest.config[section].get(name, mine)  # a key that is younger than the checkpoint
    if mine != theirs:
        raise CheckpointError(
            f"{path}: {key} is {_shown(theirs)} there and {_shown(mine)} in this run, and cannot change: {reason}; "
            f"set it to {_shown(theirs)}, or {other_way}"
        )


def _stored(manifest: Manifest, section: str, key: str) -> Any:
    """The checkpoint's value of a key that defines the model.

    A checkpoint that is older than the key is of a model with the key's default.
    """
    values = manifest.config.get(section, {})  # a section may be younger than the checkpoint, too
    if key in values:
        return values[key]
    section_class: type[Section] = RunConfig.model_fields[section].annotation  # type: ignore[assignment]
    return to_jsonable_python(section_class.model_fields[key].get_default(call_default_factory=True))


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    return "null" if value is None else str(value)


def _model_part(key: str, value: Any) -> Any:
    """The part of a key's value that defines the model: whether added tables are trained is not in it."""
    if key == "added":
        return [{name: own for name, own in group.items() if name != "frozen"} for group in value or []]
    return value


# Keys that decide what DeepSpeed's files hold, beside the layout and the class of AdamW.
_FILE_KEYS = ("parallel.offload_optimizer", "parallel.pipeline_partition")


def same_deepspeed_files(config: dict[str, Any], layout: CheckpointLayout, manifest: Manifest) -> bool:
    """Whether DeepSpeed can load its own files in a run of `config` and `layout`; else they are read by parameter."""
    pairs = [(config["deepspeed"], manifest.config.get("deepspeed", {})), (layout, manifest.layout)]
    for key in _FILE_KEYS:
        section, name = key.split(".")
        mine = config[section][name]
        pairs.append((mine, manifest.config[section].get(name, mine)))
    pairs.append((_has_apex_adamw(config), _has_apex_adamw(manifest.config)))
    return all(mine == theirs for mine, theirs in pairs)


def _has_apex_adamw(config: dict[str, Any]) -> bool:
    """Whether a run's AdamW is apex's, whose state has another form; that of all other kernels is torch's."""
    kernels = config["training"].get("kernels", "auto")
    return kernels == "apex" and config["parallel"].get("offload_optimizer", "none") == "none"
