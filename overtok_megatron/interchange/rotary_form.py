"""Rotary parameters in Hugging Face's configurations: one key in transformers 5, two in release 4, older names before. Pure.

release 5       rope_parameters: {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}; by kind of layer in Olmo3
release 4       rope_theta: 5e5, rope_scaling: {"rope_type": "linear", "factor": 2.0}, or none
before 4.43     the same with "type" instead of "rope_type"
"""

from typing import Any

from overtok_megatron.config.schema import ModelConfig
from overtok_megatron.errors import CheckpointError

_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"},
}
_WITHOUT_EFFECT = {"truncate": True, "partial_rotary_factor": 1.0}  # transformers' defaults


def plain_parameters(model: ModelConfig) -> dict[str, Any]:
    """The rotary parameters of layers whose angles are not scaled."""
    return {"rope_type": "default", "rope_theta": model.rope_theta}


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """The rotary parameters of layers with full attention, by the names of release 5."""
    if model.rope_scaling is None:
        return plain_parameters(model)
    section = model.rope_scaling.model_dump(exclude_none=True)
    kind = section.pop("type")
    defaults = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    return {"rope_type": kind, "rope_theta": model.rope_theta, **defaults, **section}


def release_4_values(model: ModelConfig, family: str) -> dict[str, Any]:
    """The keys of config.json that transformers 4.57 reads; release 5 finds the same parameters in them.

    The Olmo3 of 4.57 scales only layers with full attention, as ours does. Its Olmo2 takes only linear scaling, by two keys
    with older names and with a factor above 1.
    """
    if model.rope_scaling is None:
        return {"rope_theta": model.rope_theta, "rope_scaling": None}
    scaling: dict[str, Any] | None = {
        key: value for key, value in rope_parameters(model).items() if key != "rope_theta"
    }
    if family == "olmo2" and model.rope_scaling.type == "linear":
        factor = model.rope_scaling.factor
        scaling = {"type": "linear", "factor": factor} if factor > 1.0 else None  # a factor of 1 changes no angle
    return {"rope_theta": model.rope_theta, "rope_scaling": scaling}


def read_parameters(values: dict[str, Any], where: str) -> tuple[dict[str, Any], bool]:
    """(parameters of layers with full attention, whether there are sliding layers) of a family's complete configuration.

    values: in the form of release 5. Raises CheckpointError where sliding layers have scaled angles, or another base.
    """
    rope = dict(values["rope_parameters"])
    kinds = values.get("layer_types") or []
    if "rope_type" in rope:
        return rope, "sliding_attention" in kinds and values["model_type"] == "olmo3"
    full, sliding = dict(rope["full_attention"]), dict(rope["sliding_attention"])
    if "sliding_attention" not in kinds:
        return full, False
    if sliding.get("rope_type") != "default" or sliding["rope_theta"] != full["rope_theta"]:
        raise CheckpointError(
            f"{where}: rope_parameters: {sliding} for sliding layers; they must be default, with the theta of the others"
        )
    return full, True


def read_scaling(rope: dict[str, Any], where: str) -> dict[str, Any] | None:
    """The section model.rope_scaling for rotary parameters without their theta; None where no angle is scaled.

    `type` is the older name of `rope_type`; transformers keeps it beside the new one, which it reads. Raises CheckpointError
    naming what is not supported.
    """
    kind = rope.get("rope_type")
    if rope.get("type", kind) != kind:
        raise CheckpointError(
            f"{where}: rope_scaling: type: {rope['type']}, which transformers takes for rope_type {kind} here; write rope_type "
            "alone"
        )
    given = {
        key: value
        for key, value in rope.items()
        if key not in ("rope_type", "type") and value is not None and _WITHOUT_EFFECT.get(key) != value
    }
    if kind not in ("default", *_KEYS):
        raise CheckpointError(f"{where}: rope_parameters.rope_type: {kind}; {', '.join(_KEYS)} are supported")
    # partial_rotary_factor has an effect with every type, the other keys only with a type that scales
    unsupported = given.keys() & {"partial_rotary_factor"} if kind == "default" else given.keys() - _KEYS[kind]
    if unsupported:
        name = min(unsupported)
        raise CheckpointError(f"{where}: rope_parameters.{name}: {given[name]}; not supported with rope_type {kind}")
    if kind == "default":
        return None
    numbers = {key: value if key.startswith("original") else float(value) for key, value in given.items()}
    return {"type": kind, **numbers}
