"""The output head with its fused cross entropy, against torch's cross entropy over logits that are all in memory at once.

Besides the numbers, time per position, also that of the device alone, is held against that of the three products, and on CUDA
the memory that the loss takes against the bound that linear_cross_entropy states. Shapes: N positions, d hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_checks.registry import Context, Result
from gpu_checks.timing import device_seconds_of, free_memory, seconds_of
from overtok_megatron.kernels.choice import choose_kernels
from overtok_megatron.model.heads import OutputHead
from overtok_megatron.model.norm import RMSNorm
from overtok_megatron.parallel.cross_entropy import chunk_bound, linear_cross_entropy
from overtok_megatron.parallel.vocabulary import VocabParallelHead
from overtok_megatron.training.peaks import measured

_EPSILON = 1e-6


class Head:
    """The check for one vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, context: Context) -> Result:
        vocabulary, hidden_size = (self.vocabulary, 2048) if context.cuda else (self.vocabulary // 100 + 1, 64)
        count = 128
        if context.cuda:  # at most six float32 tensors [N, V] exist at a time
            count = min(8192, int(free_memory(context) * 0.8 - 16 * vocabulary * hidden_size) // (24 * vocabulary))
        dtype = torch.bfloat16 if context.cuda else torch.float32
        head, hidden, targets = _made(context, vocabulary, hidden_size, count, dtype)
        exact = _by_torch(head, hidden, targets, torch.float32)
        torchs = _by_torch(head, hidden, targets, dtype)
        ours = _ours(head, hidden, targets)
        names = ("loss", "gradient of hidden", "of the norm", "of the weight")
        errors = {name: _distance(a, b) for name, a, b in zip(names, ours, exact, strict=True)}
        limits = {name: _distance(a, b) for name, a, b in zip(names, torchs, exact, strict=True)}
        # as near to float32 as torch's own form in the same precision, with room for another order of its sums
        floor = 2e-3 if dtype == torch.bfloat16 else 2e-5
        wrong = [name for name in names if not errors[name] <= 2 * limits[name] + floor]
        seconds = seconds_of(lambda: _ours(head, hidden, targets), context.device, rounds=5)
        on_device = device_seconds_of(lambda: _ours(head, hidden, targets), context.device)
        least = 6 * count * vocabulary * hidden_size / measured(context.device, dtype)
        worst = max(names, key=lambda name: errors[name])
        figure = f"V {vocabulary}: {worst} off by {errors[worst]:.1e}; {1e6 * seconds / count:.2f} us per token"
        figure += f", {1e6 * on_device / count:.2f} of them on the device"
        limit = f"off by {2 * limits[worst] + floor:.1e}; {1e6 * least / count:.2f} us (three products)"
        numbers: dict[str, Any] = {
            "errors": errors,
            "torch_errors": limits,
            "seconds": seconds,
            "device_seconds": on_device,
            "limit_seconds": least,
            "positions": count,
            "bound_bytes": _stated_bytes(hidden.flatten(0, 1), head.output.weight),
        }
        if context.cuda:
            numbers["peak_bytes"] = _peak_bytes(head, hidden.flatten(0, 1), targets.flatten())
            figure += f"; {numbers['peak_bytes'] / 2**20:.0f} MiB"
            limit += f"; {numbers['bound_bytes'] / 2**20:.0f} MiB"
        return Result(not wrong and numbers.get("peak_bytes", 0) <= numbers["bound_bytes"], figure, limit, numbers)


def _made(
    context: Context, vocabulary: int, hidden_size: int, count: int, dtype: torch.dtype
) -> tuple[OutputHead, Tensor, Tensor]:
    """A head, hidden states [1, N, d], and targets [1, N] of which some are not scored and one is the last token."""
    generator = torch.Generator().manual_seed(vocabulary)
    kernels = choose_kernels("auto", context.device)
    norm = RMSNorm(hidden_size, eps=_EPSILON, kernels=kernels)
    head = OutputHead(norm=norm, output=VocabParallelHead(vocabulary, hidden_size), kernels=kernels)
    with torch.no_grad():
        head.norm.weight.normal_(1.0, 0.1, generator=generator)
        head.output.weight.normal_(0.0, 0.05, generator=generator)
    head.to(device=context.device, dtype=dtype)
    hidden = torch.randn(1, count, hidden_size, generator=generator).to(context.device, dtype)
    targets = torch.randint(0, vocabulary, (1, count), generator=generator)
    targets[:, ::7] = -100
    targets[:, -1] = vocabulary - 1
    return head, hidden, targets.to(context.device)


def _ours(head: OutputHead, hidden: Tensor, targets: Tensor) -> list[Tensor]:
    """Mean loss and its gradients by hidden states, norm and weight."""
    leaf = hidden.clone().requires_grad_()
    result = head.forward_losses(leaf, targets)
    scored = (targets >= 0).sum()
    gradients = torch.autograd.grad(result.objective / scored, [leaf, head.norm.weight, head.output.weight])
    return [result.main_loss / scored, *gradients]


def _by_torch(head: OutputHead, hidden: Tensor, targets: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same by torch's operators, computed in `dtype` from the same values."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, head.norm.weight, head.output.weight)]
    leaf, norm, weight = leaves
    normed = F.rms_norm(leaf, (leaf.shape[-1],), norm, _EPSILON)
    loss = F.cross_entropy(F.linear(normed, weight).flatten(0, 1).float(), targets.flatten())
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _stated_bytes(hidden: Tensor, weight: Tensor) -> int:
    """What linear_cross_entropy says that it takes at most, hidden [N, d] and weight [V, d] themselves not counted."""
    (tokens, width), vocabulary, size = hidden.shape, weight.shape[0], weight.element_size()
    bound = chunk_bound(hidden.device.type, hidden.dtype)
    columns = bound.columns(vocabulary)
    chunk = min(tokens, bound.chunk_tokens(tokens, vocabulary)) * columns * size
    padded_weight = columns * width * size if columns > vocabulary else 0
    gradients = tokens * width * size + columns * width * 4  # of hidden, and of the weight in float32
    vectors = 2**26  # [c] and [N], and what the allocator rounds up
    return gradients + max(chunk + padded_weight, weight.numel() * size) + vectors


def _peak_bytes(head: OutputHead, hidden: Tensor, targets: Tensor) -> int:
    """Most bytes that one forward and backward pass of the loss added to what was allocated before; after one to warm up."""
    leaf = hidden.detach().requires_grad_()
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        objective, _ = linear_cross_entropy(leaf, head.output.weight, targets, kernels=head.kernels)
        torch.autograd.grad(objective / len(leaf), [leaf, head.output.weight])
        del objective
    return torch.cuda.max_memory_allocated() - before


def _distance(value: Tensor, exact: Tensor) -> float:
    """The norm of the difference, as a share of the norm of the exact value."""
    assert torch.isfinite(value).all(), "is not finite"
    return float((value.float() - exact.float()).norm() / exact.float().norm())
