"""Attention with shared heads, windows and documents against dense masks in float32; its time and its memory.

Shapes: b batch, s sequence, h query heads, g key/value heads, e head size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_checks.registry import Context, Result
from gpu_checks.timing import device_seconds_of, seconds_of
from overtok_megatron.kernels import reference
from overtok_megatron.kernels.choice import CausalAttention, choose_kernels
from overtok_megatron.kernels.documents import Documents
from overtok_megatron.kernels.flex_attention import document_block_mask

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
        documents = None if ids is None else Documents(ids)
        ours = _run(causal_attention, inputs, window, documents)
        again = _run(causal_attention, inputs, window, None if ids is None else Documents(ids))
        torchs = _run(reference.causal_attention, inputs, window, documents)
        exact = _run(reference.causal_attention, [x.float() for x in inputs], window, documents)
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
    """Forward and backward per length: plain causal, with a window, within documents; and with a dense mask for comparison.

    The block mask of documents is made once, as a model makes it once per micro-batch for all layers, and timed apart.
    """
    causal_attention = choose_kernels("auto", context.device).causal_attention
    numbers: dict[str, Any] = {}
    words = []
    for length in (4096, 16384) if context.cuda else (64, 128):
        inputs = _inputs(context, (1, 16, 4, length, 128 if context.cuda else 16), torch.bfloat16)
        ids = _document_ids(context, 1, length, length // 8)
        forms: dict[str, tuple[CausalAttention, int | None, Documents | None]] = {
            "causal": (causal_attention, None, None),
            "window": (causal_attention, length // 8, None),
            "documents": (causal_attention, None, Documents(ids)),
            "dense mask": (reference.causal_attention, None, Documents(ids)),
        }
        found = {name: _measured(context, form, inputs) for name, form in forms.items()}
        mask = _timed(context, partial(document_block_mask, ids, None))
        numbers[f"s {length}"] = {**found, "mask": mask}
        base = found["causal"]["device_seconds"]
        parts = [
            f"{name} {found[name]['device_seconds'] / base:.2f} x" for name in ("window", "documents", "dense mask")
        ]
        words.append(f"s {length}: causal {1e3 * base:.2f} ms of the device, {', '.join(parts)}")
        words.append(
            f"mask of documents {1e3 * mask['seconds']:.2f} ms, {1e3 * mask['device_seconds']:.2f} of the device"
        )
        if context.cuda:
            words.append(", ".join(f"{name} {found[name]['bytes'] / 2**20:.0f} MiB" for name in forms))
    return Result(None, "; ".join(words), "window and documents below 1 x at 16384", numbers)


def _timed(context: Context, work: Callable[[], object]) -> dict[str, float]:
    """Seconds until a call is done, and seconds of the device alone."""
    seconds = seconds_of(work, context.device, rounds=5)
    return {"seconds": seconds, "device_seconds": device_seconds_of(work, context.device)}


def _measured(
    context: Context, form: tuple[CausalAttention, int | None, Documents | None], inputs: list[Tensor]
) -> dict[str, float]:
    """The times of forward and backward without masks, which the first call leaves; on CUDA the most bytes, masks included."""
    kernel, window, documents = form
    found = _timed(context, lambda: _run(kernel, inputs, window, documents))
    if not context.cuda:
        return found
    before = torch.cuda.memory_allocated(context.device)
    torch.cuda.reset_peak_memory_stats(context.device)
    _run(kernel, inputs, window, None if documents is None else Documents(documents.ids))
    return {**found, "bytes": torch.cuda.max_memory_allocated(context.device) - before}


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
    causal_attention: CausalAttention, inputs: list[Tensor], window: int | None, documents: Documents | None
) -> list[Tensor]:
    """The result [b, s, h, e] and the gradients by q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
    out = causal_attention(q, k, v, window, documents).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[0].cos())]


def _distance(value: Tensor, exact: Tensor) -> float:
    """The norm of the difference, as a share of the norm of the exact value."""
    assert torch.isfinite(value).all(), "is not finite"
    return float((value.float() - exact).norm() / exact.norm())
