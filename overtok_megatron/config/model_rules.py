"""Rules across the keys of the model section, and between them and the axes that split a layer."""

from collections.abc import Callable

from overtok_megatron.config.derived import attention_windows, head_size, key_value_heads
from overtok_megatron.config.nearest import nearest_divisor, nearest_multiple, number_does
from overtok_megatron.config.schema import ModelConfig, RunConfig

Need = Callable[
    [bool, str, object, str], None
]  # (holds, key, value, reason and way out); raises where it does not hold

_SCALING_KEYS = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


def check_model(config: RunConfig, need: Need) -> None:
    """Every rule about the shape of the model."""
    _check_heads(config, need)
    _check_windows(config.model, need)
    _check_scaling(config.model, need)
    _check_experts(config.model, need)


def _check_heads(config: RunConfig, need: Need) -> None:
    model, tensor = config.model, config.parallel.tensor_parallel_size
    split = tensor * config.parallel.context_parallel_size
    heads, kv_heads, given = model.num_attention_heads, key_value_heads(model), model.head_size
    better_kv_heads = number_does(nearest_divisor(heads, kv_heads, multiple_of=split))
    better_width = number_does(nearest_multiple(tensor, model.intermediate_size))
    if given is not None:
        better_heads = number_does(nearest_multiple(split, heads))
    elif model.hidden_size % (2 * split) == 0:
        better_heads = number_does(nearest_divisor(model.hidden_size // 2, heads, multiple_of=split))
    else:
        wide = nearest_multiple(2 * split, model.hidden_size)
        better_heads = f"no number does while hidden_size is not a multiple of {2 * split}, as {wide} is"
    if given is None:
        need(
            model.hidden_size % heads == 0,
            "model.num_attention_heads",
            heads,
            f"does not divide hidden_size {model.hidden_size}; {better_heads}",
        )
        need(
            head_size(model) % 2 == 0,
            "model.num_attention_heads",
            heads,
            f"gives heads of odd size {head_size(model)}, which rotary positions cannot pair; {better_heads}",
        )
    else:
        need(given % 2 == 0, "model.head_size", given, f"is odd, and rotary positions need pairs; {given + 1} does")
    need(
        heads % kv_heads == 0,
        "model.num_key_value_heads",
        kv_heads,
        f"does not divide num_attention_heads {heads}; {better_kv_heads}",
    )
    both = "parallel.tensor_parallel_size" + (" x context_parallel_size" if split > tensor else "")
    for key, size, parts, names, way_out in (
        ("model.num_attention_heads", heads, split, both, better_heads),
        ("model.num_key_value_heads", kv_heads, split, both, better_kv_heads),
        ("model.intermediate_size", model.intermediate_size, tensor, "parallel.tensor_parallel_size", better_width),
    ):
        need(size % parts == 0, key, size, f"must be a multiple of {names} {parts}; {way_out}")


def _check_windows(model: ModelConfig, need: Need) -> None:
    interval, pattern = model.full_attention_interval, model.attention_pattern
    for key, value in (("full_attention_interval", interval), ("attention_pattern", pattern)):
        need(
            value is None or model.sliding_window is not None,
            f"model.{key}",
            value,
            "says which layers slide, but there is no model.sliding_window; give it, or remove this key",
        )
    need(
        interval is None or pattern is None,
        "model.full_attention_interval",
        interval,
        "contradicts model.attention_pattern, which says the same layer by layer; remove one",
    )
    need(
        pattern is None or len(pattern) == model.num_layers,
        "model.attention_pattern",
        f"{len(pattern or ())} layers",
        f"must say full or sliding for each of the {model.num_layers} layers (model.num_layers)",
    )


def _check_scaling(model: ModelConfig, need: Need) -> None:
    scaling = model.rope_scaling
    if scaling is None:
        return
    own = _SCALING_KEYS[scaling.type]
    for keys in _SCALING_KEYS.values():
        for key in keys:
            value = getattr(scaling, key)
            need(
                value is None or key in own,
                f"model.rope_scaling.{key}",
                value,
                f"is no part of type {scaling.type}; remove it",
            )
    need(
        scaling.original_max_position_embeddings is not None or not own,
        "model.rope_scaling.original_max_position_embeddings",
        "none",
        f"is needed by type {scaling.type}: the context of pretraining, in tokens",
    )
    for low, high, low_default, high_default in (
        ("low_freq_factor", "high_freq_factor", 1.0, 4.0),
        ("beta_slow", "beta_fast", 1.0, 32.0),
    ):
        least, most = getattr(scaling, low) or low_default, getattr(scaling, high) or high_default
        need(least < most, f"model.rope_scaling.{low}", least, f"must be less than {high} {most}")
    need(
        None in attention_windows(model),
        "model.rope_scaling",
        scaling.type,
        "is for layers with full attention, and every layer slides; remove it, or give model.full_attention_interval",
    )


def _check_experts(model: ModelConfig, need: Need) -> None:
    experts, chosen = model.num_experts, model.num_experts_per_token
    if experts is None:
        for key, value in (
            ("num_experts_per_token", chosen),
            ("normalize_expert_weights", model.normalize_expert_weights),
            ("router_z_loss_weight", model.router_z_loss_weight),
        ):
            need(not value, f"model.{key}", value, "needs model.num_experts; give it, or remove this key")
        return
    need(
        chosen is not None,
        "model.num_experts_per_token",
        "none",
        f"is needed with model.num_experts {experts}; {min(8, experts)} is usual",
    )
    assert chosen is not None
    need(
        chosen <= experts,
        "model.num_experts_per_token",
        chosen,
        f"is more than model.num_experts {experts}; {experts} is the most",
    )
