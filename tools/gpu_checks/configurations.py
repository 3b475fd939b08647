"""Three steps of every way of training, against the same model on the CPU in float32; then in bfloat16.

A case is a model (which has a reference) and a way of running it (which must not change the losses).
"""

from dataclasses import dataclass, field

import torch

from gpu_checks.registry import Context, Result
from gpu_checks.training import (
    STEPS,
    Settings,
    engine_of,
    losses_of,
    made_tokens,
    reference_losses,
    small_configuration,
    train_steps,
)

_EXACT = 1e-4  # of the loss, float32: sums run in another order, which three steps of AdamW amplify
_ROUTED = 2e-3  # with experts: a router score that rounds differently sends a token to another expert
_BF16 = 0.02

MODELS: dict[str, Settings] = {
    "plain": {},
    "int8": {"over_encoding.row_dtype": "int8", "over_encoding.optimizer": "rowwise_adam"},
    "float32": {
        "over_encoding.row_dtype": "float32",
        "over_encoding.state_dtype": "float32",
        "over_encoding.optimizer": "adam",
    },
    "grown": {
        "over_encoding.frozen": True,
        "over_encoding.added": [{"orders": [2, 4], "num_slices": 1, "table_rows": 1511}],
    },
    "experts": {"model.num_experts": 4, "model.num_experts_per_token": 2, "model.intermediate_size": 48},
    "sliding": {"model.sliding_window": 20, "model.full_attention_interval": 2},
    "documents": {"data.document_attention": "within"},
    "grouped": {"model.num_key_value_heads": 2, "model.norm_placement": "pre", "model.qk_norm": "none"},
    "tied": {"model.tie_word_embeddings": True, "training.z_loss": 1e-4},
    "baseline": {"over_encoding.enabled": False},
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """model: a key of MODELS. settings: change how it is run, not what it computes. quick: part of --quick."""

    model: str
    settings: Settings = field(default_factory=dict)
    quick: bool = False
    tolerance: float = _EXACT


def _zero(stage: int, *, offload: bool = False) -> Settings:
    settings: Settings = {"parallel.zero_stage": stage}
    return settings | ({"parallel.offload_optimizer": "cpu"} if offload else {})


WAYS: dict[str, Way] = {
    **{f"zero {stage}": Way("plain", _zero(stage), quick=stage == 2) for stage in range(4)},
    **{f"zero {stage}, offload": Way("plain", _zero(stage, offload=True), quick=stage == 3) for stage in (1, 2, 3)},
    "two micro-batches": Way("plain", {"micro_batches": 2}),
    "host tables": Way("plain", {"over_encoding.storage": "host"}, quick=True),
    "recompute full": Way("plain", {"training.recompute": "full"}),
    "recompute selective": Way("plain", {"training.recompute": "selective"}),
    "deterministic": Way("plain", {"training.deterministic": True}, quick=True),
    "kernels torch": Way("plain", {"training.kernels": "torch"}),
    "int8 rows": Way("int8", quick=True),
    "float32 rows, adam": Way("float32"),
    "frozen and added": Way("grown"),
    "experts": Way("experts", tolerance=_ROUTED),
    "sliding window": Way("sliding"),
    "documents within": Way("documents"),
    "grouped queries": Way("grouped", quick=True),
    "tied, z-loss": Way("tied"),
    "baseline": Way("baseline"),
}


class Configuration:
    """The check of one way."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, context: Context) -> Result:
        way = WAYS[self.name]
        settings = MODELS[way.model] | way.settings
        losses = losses_of(context, small_configuration(context, context.cuda, settings))
        bf16 = settings | {"training.precision": "bf16"}
        narrow = losses_of(context, small_configuration(context, context.cuda, bf16))
        return compared(losses, narrow, reference_losses(context, way.model), way.tolerance)


def compared(losses: list[float], narrow: list[float], expected: list[float], tolerance: float) -> Result:
    """Losses in float32, and in bfloat16 (`narrow`), beside those of the reference; a loss that is not finite fails."""
    away, far = (
        max(abs(a - b) / abs(b) if a == a else float("inf") for a, b in zip(own, expected, strict=True))
        for own in (losses, narrow)
    )
    return Result(
        away <= tolerance and far <= _BF16,
        f"losses off by {away:.1e}, in bf16 by {far:.1e}",
        f"{tolerance:.0e}, {_BF16:.0e} of the CPU's",
        {"losses": losses, "bf16_losses": narrow, "expected": expected},
    )


def host_bits(context: Context) -> Result:
    """Tables in host memory and tables on the model's device give the same losses and rows: bit for bit on a CPU; to rounding
    on a GPU, which sums a row's gradients in another order."""
    found = []
    for storage in ("device", "host"):
        config = small_configuration(
            context, context.cuda, {"over_encoding.storage": storage, "training.deterministic": context.cuda}
        )
        engine = engine_of(context, config)
        losses = train_steps(engine, made_tokens(context, config, STEPS + 2))
        assert engine.tables is not None
        found.append((losses, {name: column.cpu() for name, column in engine.tables.columns().items()}))
        del engine
    (first, columns), (second, others) = found
    apart = {name: float((values != others[name]).double().mean()) for name, values in columns.items()}
    away = max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))
    return Result(
        away <= _EXACT if context.cuda else away == 0 and not any(apart.values()),
        f"losses off by {away:.1e}; {max(apart.values()):.2%} of the values of rows and state differ",
        f"{_EXACT:.0e}" if context.cuda else "none",
        {"losses": [first, second], "apart": apart},
    )


def saving_device(context: Context) -> Result:
    """The thread that saves works on this process's device, not on the machine's first."""
    from overtok_megatron.training.saving import in_background

    seen: list[int] = []
    thread = in_background(lambda: seen.append(torch.cuda.current_device()), context.device)
    thread.join()
    return Result(seen == [context.device.index], f"CUDA device {seen[0]}", f"{context.device.index}")
