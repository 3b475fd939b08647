"""Attention with shared heads, windows and documents against dense masks in float32; its time and its memory.

Shapes: b batch, s sequence, h query heads, g key/value heads, e head size.
"""

from typing import Any

import torch
from torch import Tensor

from gpu_checks.registry import Context, Result
from gpu_checks.timing import seconds_of
from overtok_megatron.kernels import reference
from overtok_megatron.kernels.choice import CausalAttention, choose_kernels
from overtok_megatron.kernels.documents import Documents

# length, window, mean length of documents, dtype; in this order, so that few shapes are compiled
_CASES = [
    (300, 70, None, torch.float32),
    (513, None, 60, torch.bfloat16),
    (640, 129, 200, torch.bfloat16),
    (1000, None, 300, torch.float32),
    (1024, 256, 300, torch.float32),
    (37, 5, 9, torch.bfloat16),
]


def attention(context: Context) -> Result:
    """The result and the three gradients of the kernels of this device, and whether a second run gives the same bits."""
    causal_attention = choose_kernels("auto", context.device).causal_attention
    errors, wrong = {}, []
    for length, window, mean, dtype in _CASES if context.cuda else _CASES[:1] + _CASES[-1:]:
        inputs = _inputs(context, (2, 6, 2, length, 64), dtype)
        ids = None if mean is None else _document_ids(context, 2, length, mean)
        ours = _run(causal_attention, inputs, window, ids)
        again = _run(causal_attention, inputs, window, ids)
        torchs = _run(reference.causal_attention, inputs, window, ids)
        exact = _run(reference.causal_attention, [x.float() for x in inputs], window, ids)
        case = f"s {length}, window {window}, documents {mean}, {str(dtype).removeprefix('torch.')}"
        floor = 4e-3 if dtype == torch.bfloat16 else 1e-5
        for name, a, b, c, d in zip(("result", "by q", "by k", "by v"), ours, again, torchs, exact, strict=True):
            errors[f"{name}: {case}"] = error = _distance(a, d)
            if not error <= 2 * _distance(c, d) + floor:
                wrong.append(f"{name}: {case}")
            if not torch.equal(a, b):
                wrong.append(f"{name} differs between two runs: {case}")
    worst = max(errors, key=lambda name: errors[name])
    return Result(
        not wrong,
        f"{wrong[0]} is wrong" if wrong else f"off by {errors[worst]:.1e} ({worst})",
        "twice torch's own error in the same precision",
        {"errors": errors, "wrong": wrong},
    )


def attention_speed(context: Context) -> Result:
    """Forward and backward per length: plain causal, with a window, within documents; and with a dense mask for comparison."""
    causal_attention = choose_kernels("auto", context.device).causal_attention
    numbers: dict[str, Any] = {}
    words = []
    for length in (4096, 16384) if context.cuda else (64, 128):
        inputs = _inputs(context, (1, 16, 4, length, 128 if context.cuda else 16), torch.bfloat16)
        ids = _document_ids(context, 1, length, length // 8)
        forms: dict[str, tuple[CausalAttention, int | None, Tensor | None]] = {
            "causal": (causal_attention, None, None),
            "window": (causal_attention, length // 8, None),
            "documents": (causal_attention, None, ids),
            "dense mask": (reference.causal_attention, None, ids),
        }
        found = {name: _measured(context, form, inputs) for name, form in forms.items()}
        numbers[f"s {length}"] = found
        base = found["causal"]["seconds"]
        parts = [f"{name} {found[name]['seconds'] / base:.2f} x" for name in ("window", "documents", "dense mask")]
        words.append(f"s {length}: causal {1e3 * base:.2f} ms, {', '.join(parts)}")
        if context.cuda:
            words.append(", ".join(f"{name} {found[name]['bytes'] / 2**20:.0f} MiB" for name in forms))
    return Result(None, "; ".join(words), "window and documents below 1 x at 16384", numbers)


def _measured(
    context: Context, form: tuple[CausalAttention, int | None, Tensor | None], inputs: list[Tensor]
) -> dict[str, float]:
    """Seconds of forward and backward, the mask of documents included, and on CUDA the most bytes that they take."""
    seconds = seconds_of(lambda: _run(form[0], inputs, *form[1:]), context.device, rounds=5)
    if not context.cuda:
        return {"seconds": seconds}
    before = torch.cuda.memory_allocated(context.device)
    torch.cuda.reset_peak_memory_stats(context.device)
    _run(form[0], inputs, *form[1:])
    return {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated(context.device) - before}


def _inputs(context: Context, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q [b, s, h, e], k and v [b, s, g, e], as the model has them before it takes the heads first."""
    batch, heads, kv_heads, length, size = shape
    generator = torch.Generator().manual_seed(length)
    counts = (heads, kv_heads, kv_heads)
    return [torch.randn(batch, length, count, size, generator=generator).to(context.device, dtype) for count in counts]


def _document_ids(context: Context, batch: int, length: int, mean: int) -> Tensor:
    """int64 [b, s], rising along s: documents of about `mean` positions."""
    begins = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 1 / mean
    return begins.long().cumsum(1).to(context.device)


def _run(
    causal_attention: CausalAttention, inputs: list[Tensor], window: int | None, ids: Tensor | None
) -> list[Tensor]:
    """The result [b, s, h, e] and the gradients by q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
    out = causal_attention(q, k, v, window, None if ids is None else Documents(ids)).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[0].cos())]


def _distance(value: Tensor, exact: Tensor) -> float:
    """The norm of the difference, as a share of the norm of the exact value."""
    assert torch.isfinite(value).all(), "is not finite"
    return float((value.float() - exact).norm() / exact.norm())
