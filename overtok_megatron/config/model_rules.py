"""Rules across the keys of the model section, and between them and the axes that split a layer."""

from collections.abc import Iterator

from overtok_megatron.config.derived import attention_windows, head_size, key_value_heads
from overtok_megatron.config.nearest import nearest_divisor, nearest_multiple, number_does
from overtok_megatron.config.problems import Problem, problem
from overtok_megatron.config.schema import ModelConfig, RopeScalingConfig, RunConfig

_HEADS = "model.num_attention_heads"
_PATTERN, _INTERVAL = "model.attention_pattern", "model.full_attention_interval"
_TENSOR = "parallel.tensor_parallel_size"
_SPLIT = (_TENSOR, "parallel.context_parallel_size")  # the axes that split heads
_SCALING_KEYS = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


def model_problems(config: RunConfig) -> Iterator[Problem]:
    """What breaks the rules about the shape of the model."""
    yield from _head_problems(config)
    yield from _window_problems(config.model)
    if config.model.rope_scaling is not None:
        yield from _scaling_problems(config.model, config.model.rope_scaling)
    yield from _expert_problems(config.model)


def _head_problems(config: RunConfig) -> Iterator[Problem]:
    model, tensor = config.model, config.parallel.tensor_parallel_size
    split = tensor * config.parallel.context_parallel_size
    heads, kv_heads = model.num_attention_heads, key_value_heads(model)
    better_heads = _better_heads(model, split)
    better_kv_heads = number_does(nearest_divisor(heads, kv_heads, multiple_of=split))
    better_width = number_does(nearest_multiple(tensor, model.intermediate_size))
    if model.head_size is not None:
        if model.head_size % 2:
            reason = f"is odd, and rotary positions need pairs; {model.head_size + 1} does"
            yield problem("model.head_size", model.head_size, reason)
    elif model.hidden_size % heads:
        reason = f"does not divide hidden_size {model.hidden_size}; {better_heads}"
        yield problem(_HEADS, heads, reason, ("model.head_size",))
    elif head_size(model) % 2:
        reason = f"gives heads of odd size {head_size(model)}, which rotary positions cannot pair; {better_heads}"
        yield problem(_HEADS, heads, reason, ("model.head_size",))
    if heads % kv_heads:
        reason = f"does not divide num_attention_heads {heads}; {better_kv_heads}"
        yield problem("model.num_key_value_heads", kv_heads, reason, (_HEADS,))
    both = _TENSOR + (" x context_parallel_size" if split > tensor else "")
    if heads % split:
        yield problem(_HEADS, heads, f"must be a multiple of {both} {split}; {better_heads}", _SPLIT)
    if kv_heads % split:  # where nobody gave their number, it is that of the query heads
        reason = f"must be a multiple of {both} {split}; {better_kv_heads}"
        yield problem("model.num_key_value_heads", kv_heads, reason, (*_SPLIT, _HEADS))
    if model.intermediate_size % tensor:
        reason = f"must be a multiple of {_TENSOR} {tensor}; {better_width}"
        yield problem("model.intermediate_size", model.intermediate_size, reason, (_TENSOR,))


def _better_heads(model: ModelConfig, split: int) -> str:
    """What number of query heads would do, as the end of a sentence."""
    if model.head_size is not None:
        return number_does(nearest_multiple(split, model.num_attention_heads))
    if model.hidden_size % (2 * split) == 0:
        return number_does(nearest_divisor(model.hidden_size // 2, model.num_attention_heads, multiple_of=split))
    wide = nearest_multiple(2 * split, model.hidden_size)
    return f"no number does while hidden_size is not a multiple of {2 * split}, as {wide} is"


def _window_problems(model: ModelConfig) -> Iterator[Problem]:
    interval, pattern = model.full_attention_interval, model.attention_pattern
    for key, value in ((_INTERVAL, interval), (_PATTERN, pattern)):
        if value is not None and model.sliding_window is None:
            reason = "says which layers slide, but there is no model.sliding_window; give it, or remove this key"
            yield problem(key, value, reason, ("model.sliding_window",))
    if interval is not None and pattern is not None:
        reason = "contradicts model.attention_pattern, which says the same layer by layer; remove one"
        yield problem(_INTERVAL, interval, reason)
    if pattern is not None and len(pattern) != model.num_layers:
        reason = f"must say full or sliding for each of the {model.num_layers} layers (model.num_layers)"
        yield problem(_PATTERN, f"{len(pattern)} layers", reason)


def _scaling_problems(model: ModelConfig, scaling: RopeScalingConfig) -> Iterator[Problem]:
    section, own = "model.rope_scaling", _SCALING_KEYS[scaling.type]
    for keys in _SCALING_KEYS.values():
        for key in keys:
            value = getattr(scaling, key)
            if value is not None and key not in own:
                yield problem(f"{section}.{key}", value, f"is no part of type {scaling.type}; remove it")
    if scaling.original_max_position_embeddings is None and own:
        reason = f"is needed by type {scaling.type}: the context of pretraining, in tokens"
        yield problem(f"{section}.original_max_position_embeddings", "none", reason)
    for low, high, low_default, high_default in (
        ("low_freq_factor", "high_freq_factor", 1.0, 4.0),
        ("beta_slow", "beta_fast", 1.0, 32.0),
    ):
        least, most = getattr(scaling, low) or low_default, getattr(scaling, high) or high_default
        if least >= most:
            reason = f"must be less than {high} {most}"
            yield problem(f"{section}.{low}", least, reason, (f"{section}.{high}",))
    if None not in attention_windows(model):
        reason = "is for layers with full attention, and every layer slides; remove it, or give model.full_attention_interval"
        yield problem(section, scaling.type, reason, (_INTERVAL, _PATTERN))


def _expert_problems(model: ModelConfig) -> Iterator[Problem]:
    experts, chosen, key = model.num_experts, model.num_experts_per_token, "model.num_experts_per_token"
    if experts is None:
        for name in ("num_experts_per_token", "normalize_expert_weights", "router_z_loss_weight"):
            value = getattr(model, name)
            if value:
                yield problem(f"model.{name}", value, "needs model.num_experts; give it, or remove this key")
    elif chosen is None:
        yield problem(key, "none", f"is needed with model.num_experts {experts}; {min(8, experts)} is usual")
    elif chosen > experts:
        yield problem(key, chosen, f"is more than model.num_experts {experts}; {experts} is the most")
