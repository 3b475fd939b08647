"""What a model is called in Hugging Face's form, and back: model sections, configurations and weights' names. Pure.

Families: olmo2 (norms after, q and k normalised), olmo3 (olmo2 with sliding windows), llama (norms before, no q and k norms),
olmoe (experts, norms before, q and k normalised). What one of them cannot express is refused.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overtok_megatron.config.derived import attention_windows
from overtok_megatron.config.schema import ModelConfig
from overtok_megatron.errors import CheckpointError
from overtok_megatron.interchange.rotary_form import plain_parameters, read_parameters, read_scaling, rope_parameters

FAMILIES = {"llama": "Llama", "olmo2": "Olmo2", "olmo3": "Olmo3", "olmoe": "Olmoe"}
_LAYERS = {"full_attention": "full", "sliding_attention": "sliding"}
RELEASES = ("4.57", "6.0")  # of transformers, that exports are written for: from one on, below the other
_NEW_FORM = "5.0"  # from here on rotary parameters have one key, `rope_parameters`, and experts one tensor
_BY_LAYER = "5.13"  # Olmo3 of releases 5.0 to 5.12 stretches sliding layers as well


def require_transformers() -> Any:
    """The library that knows the families' configurations. Raises CheckpointError where it is not installed, or too old."""
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
    """The releases of transformers that compute an exported model, as spans: from one on, below the other.

    fused: whether its experts are exported together, which 4.57 does not load (it would begin with random ones). 4.57 knows
    no stretched angles but linear ones in Olmo2, and refuses the others.
    """
    family, scaling = family_of(model), model.rope_scaling
    if (family == "olmoe" and fused) or (family == "olmo2" and scaling is not None and scaling.type != "linear"):
        return [(_NEW_FORM, RELEASES[1])]
    if family == "olmo3" and scaling is not None:
        return [(RELEASES[0], _NEW_FORM), (_BY_LAYER, RELEASES[1])]
    return [RELEASES]


def family_of(model: ModelConfig) -> str:
    """The family whose class computes what a model section says. Raises CheckpointError where none does."""
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
    """What the family's configuration class is made with."""
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


def model_section(values: dict[str, Any], place: str) -> ModelConfig:
    """The model section that computes what a family's complete configuration says.

    values: as the class's to_dict gives them. place: what messages name. Raises CheckpointError naming the first key that
    is not supported.
    """
    family = values["model_type"]

    def refuse(key: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{place}: {key}: {values.get(key)}; {reason}")

    if family not in FAMILIES:
        raise refuse("model_type", f"models of {', '.join(FAMILIES)} are read")
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False), ("clip_qkv", None)):
        if values.get(key, wanted) != wanted:
            raise refuse(key, f"only {wanted} is supported")
    if values.get("quantization_config") is not None:
        raise refuse("quantization_config", "only unquantised weights are read; save them dequantised first")
    rope, sliding = read_parameters(values, place)
    heads, size = values["num_attention_heads"], values["hidden_size"]
    head_size = values.get("head_dim")
    section: dict[str, Any] = {
        "vocab_size": values["vocab_size"],
        "hidden_size": size,
        "intermediate_size": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "head_size": None if head_size is None or head_size * heads == size else head_size,
        "norm_placement": "pre" if family in ("llama", "olmoe") else "post",
        "qk_norm": "none" if family == "llama" else "full",
        "rope_theta": float(rope.pop("rope_theta")),
        "rope_scaling": read_scaling(rope, place),
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


@dataclass(frozen=True)
class Half:
    """The first (0) or second (1) half of a tensor along dimension 1."""

    name: str
    index: int


Place = str | list[str] | Half  # a tensor, the tensors of all experts, or a half of one


def hugging_face_names(model: ModelConfig, *, fused: bool = False) -> dict[str, Place]:
    """Where each of our dense weights is in Hugging Face's files.

    Experts, one tensor here, are one tensor each there; where `fused`, they are together, as in transformers' memory.
    """
    names: dict[str, Place] = {"embedding.word.weight": "model.embed_tokens.weight"}
    pre = model.norm_placement == "pre"
    norms = ("input", "post_attention") if pre else ("post_attention", "post_feedforward")
    for index in range(model.num_layers):
        ours, theirs = f"blocks.{index}", f"model.layers.{index}"
        for letter in "qkv":
            names[f"{ours}.attention.qkv.{letter}_proj"] = f"{theirs}.self_attn.{letter}_proj.weight"
        names[f"{ours}.attention.o_proj.weight"] = f"{theirs}.self_attn.o_proj.weight"
        if model.qk_norm == "full":
            for letter in "qk":
                names[f"{ours}.attention.{letter}_norm.weight"] = f"{theirs}.self_attn.{letter}_norm.weight"
        if model.num_experts is None:
            for part in ("gate", "up"):
                names[f"{ours}.mlp.gate_up.{part}_proj"] = f"{theirs}.mlp.{part}_proj.weight"
            names[f"{ours}.mlp.down_proj.weight"] = f"{theirs}.mlp.down_proj.weight"
        else:
            names[f"{ours}.mlp.router"] = f"{theirs}.mlp.gate.weight"
            if fused:
                for number, part in enumerate(("gate", "up")):
                    names[f"{ours}.mlp.experts_{part}"] = Half(f"{theirs}.mlp.experts.gate_up_proj", number)
                names[f"{ours}.mlp.experts_down"] = f"{theirs}.mlp.experts.down_proj"
            for part in () if fused else ("gate", "up", "down"):
                experts = [f"{theirs}.mlp.experts.{expert}.{part}_proj.weight" for expert in range(model.num_experts)]
                names[f"{ours}.mlp.experts_{part}"] = experts
        for own, norm in zip(("attention_norm", "mlp_norm"), norms, strict=True):
            names[f"{ours}.{own}.weight"] = f"{theirs}.{norm}_layernorm.weight"
    names["head.norm.weight"] = "model.norm.weight"
    if not model.tie_word_embeddings:
        names["head.output.weight"] = "lm_head.weight"
    return names


def to_ours(model: ModelConfig, held: Iterable[str], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our weights out of Hugging Face's, one after the other. held: the names that are there; read: one of them.

    Raises CheckpointError where one is missing, or has no place in the model.
    """
    there = set(held)
    left = set(there)
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in there)
    for ours, theirs in hugging_face_names(model, fused=fused).items():
        needed = theirs if isinstance(theirs, list) else [theirs.name if isinstance(theirs, Half) else theirs]
        missing = [name for name in needed if name not in there]
        if missing:
            raise CheckpointError(f"the folder holds no weight {missing[0]}")
        left -= set(needed)
        if isinstance(theirs, list):
            yield ours, torch.stack([read(name) for name in theirs])
        elif isinstance(theirs, Half):
            yield ours, read(theirs.name).chunk(2, dim=1)[theirs.index].clone()
        else:
            yield ours, read(theirs)
    if model.tie_word_embeddings:
        left.discard("lm_head.weight")  # the word embedding once more
    left = {name for name in left if not name.endswith("rotary_emb.inv_freq")}  # of old releases; not trained
    if left:
        raise CheckpointError(f"the folder holds a weight {min(left)}, which this model has no place for")


def to_theirs(
    model: ModelConfig, dense: Iterable[tuple[str, Tensor]], *, fused: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's weights out of ours, one after the other; names that are not of the backbone stay."""
    names = hugging_face_names(model, fused=fused)
    halves: dict[str, Tensor] = {}
    for ours, weight in dense:
        theirs = names.get(ours, ours)
        if isinstance(theirs, str):
            yield theirs, weight
        elif isinstance(theirs, list):
            yield from zip(theirs, weight.unbind(0), strict=True)
        elif theirs.name in halves:
            other = halves.pop(theirs.name)
            yield theirs.name, torch.cat([weight, other] if theirs.index == 0 else [other, weight], dim=1)
        else:
            halves[theirs.name] = weight
    assert not halves, "half a tensor is left"
