"""Hugging Face's families of models: which one computes a model section, and configurations in both directions. Pure.

| family | norms | q and k | else |
| --- | --- | --- | --- |
| olmo2 | after attention and feed-forward | normalised | |
| olmo3 | as olmo2 | as olmo2 | sliding windows |
| llama | before | not normalised | |
| olmoe | before | normalised | experts |

A model that none of them expresses is refused.
"""

from typing import Any

from overtok_megatron.config.derived import attention_windows
from overtok_megatron.config.schema import ModelConfig
from overtok_megatron.errors import CheckpointError
from overtok_megatron.interchange.rotary_form import plain_parameters, read_parameters, read_scaling, rope_parameters

FAMILIES = {"llama": "Llama", "olmo2": "Olmo2", "olmo3": "Olmo3", "olmoe": "Olmoe"}
_LAYERS = {"full_attention": "full", "sliding_attention": "sliding"}
RELEASES = ("4.57", "6.0")  # of transformers, for which exports are written: from the first on, below the second
_NEW_FORM = "5.0"  # from here on rotary parameters have one key, `rope_parameters`, and experts one tensor
_BY_LAYER = "5.13"  # Olmo3 of releases 5.0 to 5.12 scales the rotary angles of sliding layers as well


def require_transformers() -> Any:
    """The transformers library, which knows the configurations. Raises CheckpointError where it is missing or too old."""
    install = "pip install 'overtok_megatron[hugging_face]'"
    try:
        import transformers
    except ImportError:
        raise CheckpointError(f"transformers is not installed; {install}") from None
    first, end = _NEW_FORM, RELEASES[1]
    if not int(first.split(".")[0]) <= int(transformers.__version__.split(".")[0]) < int(end.split(".")[0]):
        raise CheckpointError(
            f"transformers {transformers.__version__} is installed; import and export need {first} or later, below {end}; "
            f"{install}"
        )
    return transformers


def releases_of(model: ModelConfig, *, fused: bool = False) -> list[tuple[str, str]]:
    """The releases of transformers that compute an exported model, as spans: from the first on, below the second.

    fused: whether the experts are exported together, which 4.57 does not load (it would start with random ones). The Olmo2 of
    4.57 knows only linear scaling of rotary angles, and refuses other kinds.
    """
    family, scaling = family_of(model), model.rope_scaling
    if (family == "olmoe" and fused) or (family == "olmo2" and scaling is not None and scaling.type != "linear"):
        return [(_NEW_FORM, RELEASES[1])]
    if family == "olmo3" and scaling is not None:
        return [(RELEASES[0], _NEW_FORM), (_BY_LAYER, RELEASES[1])]
    return [RELEASES]


def family_of(model: ModelConfig) -> str:
    """The family whose class computes the model of a model section. Raises CheckpointError where none does."""
    kind = (model.norm_placement, model.qk_norm, model.num_experts is not None, model.sliding_window is not None)
    families = {
        ("post", "full", False, False): "olmo2",
        ("post", "full", False, True): "olmo3",
        ("pre", "none", False, False): "llama",
        ("pre", "full", True, False): "olmoe",
    }
    family = families.get(kind)
    if family is None or (family == "olmoe" and model.head_size is not None):
        raise CheckpointError(
            f"model: norm_placement {model.norm_placement}, qk_norm {model.qk_norm}, num_experts {model.num_experts}, "
            f"sliding_window {model.sliding_window}, head_size {model.head_size}; no Hugging Face class of "
            f"{', '.join(FAMILIES)} computes that together"
        )
    return family


def hugging_face_values(model: ModelConfig, max_position_embeddings: int) -> dict[str, Any]:
    """The arguments of the family's configuration class."""
    values: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_word_embeddings,
        "initializer_range": model.init_std,
        "max_position_embeddings": max_position_embeddings,
    }
    rope, family = rope_parameters(model), family_of(model)
    if family == "olmo3":
        kinds = {None: "full_attention", model.sliding_window: "sliding_attention"}
        values["layer_types"] = [kinds[window] for window in attention_windows(model)]
        values["sliding_window"] = model.sliding_window
        values["rope_parameters"] = {"full_attention": rope, "sliding_attention": plain_parameters(model)}
    else:
        values["rope_parameters"] = rope
    if model.head_size is not None:
        values["head_dim"] = model.head_size
    if family == "olmoe":
        values["num_experts"] = model.num_experts
        values["num_experts_per_tok"] = model.num_experts_per_token
        values["norm_topk_prob"] = model.normalize_expert_weights
        values["router_aux_loss_coef"] = model.router_aux_loss_weight
    return values


def model_section(values: dict[str, Any], where: str) -> ModelConfig:
    """The model section that computes what a family's complete configuration says.

    values: as the class's to_dict gives them. where: the name of their file, for messages. Raises CheckpointError naming the
    first key that is not supported.
    """
    _refuse_unsupported(values, where)
    family = values["model_type"]
    rope, sliding = read_parameters(values, where)
    section = {
        **_shape_section(values),
        "norm_placement": "pre" if family in ("llama", "olmoe") else "post",
        "qk_norm": "none" if family == "llama" else "full",
        "rope_theta": float(rope.pop("rope_theta")),
        "rope_scaling": read_scaling(rope, where),
        "norm_epsilon": values["rms_norm_eps"],
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "init_std": values.get("initializer_range") or 0.02,
    }
    if sliding:
        section["sliding_window"] = values["sliding_window"]
        section["attention_pattern"] = [_LAYERS[kind] for kind in values["layer_types"]]
    if family == "olmoe":
        section["num_experts"] = values["num_experts"]
        section["num_experts_per_token"] = values["num_experts_per_tok"]
        section["normalize_expert_weights"] = values["norm_topk_prob"]
        section["router_aux_loss_weight"] = float(values["router_aux_loss_coef"])
    return ModelConfig.model_validate(section)


def _refuse_unsupported(values: dict[str, Any], where: str) -> None:
    """Raise CheckpointError naming the first key whose value no model of ours computes."""
    if values["model_type"] not in FAMILIES:
        raise CheckpointError(f"{where}: model_type: {values['model_type']}; models of {', '.join(FAMILIES)} are read")
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("clip_qkv", None)):
        if values.get(key, wanted) != wanted:
            raise CheckpointError(f"{where}: {key}: {values[key]}; only {wanted} is supported")
    if (quantization := values.get("quantization_config")) is not None:
        raise CheckpointError(
            f"{where}: quantization_config: {quantization}; only unquantised weights are read; save them dequantised first"
        )


def _shape_section(values: dict[str, Any]) -> dict[str, Any]:
    heads, hidden_size, head_size = values["num_attention_heads"], values["hidden_size"], values.get("head_dim")
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "head_size": None if head_size is None or head_size * heads == hidden_size else head_size,
    }
