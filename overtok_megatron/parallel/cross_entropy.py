"""Output projection and cross entropy in one pass, chunk by chunk, so that the logits of all tokens never exist at once.

The vocabulary may be split over the ranks of a group, which see the same tokens. Shapes: N tokens, c tokens of a chunk,
d hidden, v_shard this rank's part of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.parallel.collectives import all_reduce_in_place, group_rank
from overtok_megatron.parallel.splits import largest_part

_CHUNK_VALUES = 1 << 22  # logits of a chunk: few enough for the cache, enough for a product at full speed


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the loss and both gradients of a chunk while its logits exist; backward only scales the gradients.

    | | hidden [N, d] | weight [v_shard, d] | of each token [c]: max, sum of exp, target logit |
    | forward | the same on all ranks | own part | all-reduced |
    | backward | this rank's term of a sum, which the caller's copy or gather computes | own part | - |
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_start: int,
        group: dist.ProcessGroup | None,
        z_loss_weight: float,
        kernels: Kernels,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        objective = torch.zeros((), dtype=torch.float32, device=hidden.device)
        cross_entropy = torch.zeros_like(objective)
        # From the largest shard, because ranks with other chunks would hang in the collectives of a chunk.
        largest_shard = largest_part(vocab_start, vocab_start + weight.shape[0], group_rank(group))
        step = max(1, _CHUNK_VALUES // max(1, largest_shard))
        for start in range(0, hidden.shape[0], step):
            chunk = slice(start, start + step)
            scored = targets[chunk] != IGNORE_INDEX
            # Out of range where the target is in another rank's part, or is not scored.
            local_target = torch.where(scored, targets[chunk] - vocab_start, -1)
            logits = hidden[chunk] @ weight.t()  # [c, v_shard]
            log_sum, target_logit = _statistics(logits, local_target, group, kernels)
            losses = torch.where(scored, log_sum - target_logit, 0.0)
            cross_entropy += losses.sum()
            objective += losses.sum() + z_loss_weight * torch.where(scored, log_sum, 0.0).square().sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d objective / d logits = softmax (1 + 2 z_loss_weight log_sum) - [target], zero where not scored
            scale = torch.where(scored, 1.0 + 2.0 * z_loss_weight * log_sum, 0.0)
            grad_logits = kernels.softmax_gradient(logits, log_sum, scale, local_target)
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            grad_weight += grad_logits.t() @ hidden[chunk]
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # `grad` is a float32 scalar: rounding it to bfloat16 first would scale the head's gradient unlike all others.
        return (grad_hidden * grad, grad_weight * grad, *[None] * 6)


def _statistics(
    logits: Tensor, local_target: Tensor, group: dist.ProcessGroup | None, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """log-sum-exp and target logit over the full vocabulary, [c] float32 each.

    local_target [c]: index of the target in this rank's shard; out of range = the target is not here.
    """
    largest, exp_sum = kernels.softmax_statistics(logits)
    size = logits.shape[1]
    ours = (local_target >= 0) & (local_target < size)
    found = torch.zeros_like(largest)
    if size:
        found = logits.gather(1, torch.where(ours, local_target, 0).unsqueeze(1)).squeeze(1)
    top = largest.clone()
    all_reduce_in_place(top, group, of="maxima", op=dist.ReduceOp.MAX)
    sums = torch.stack([exp_sum * (largest - top).exp(), torch.where(ours, found.float(), 0.0), ours.float()])
    all_reduce_in_place(sums, group, of="sums")
    # A target that no rank holds is outside the vocabulary; the loss becomes NaN, so that nobody takes it for a result.
    return sums[0].log() + top, torch.where(sums[2] > 0, sums[1], torch.nan)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    z_loss_weight: float = 0.0,
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    """Summed objective and summed cross entropy in nats, float32 scalars; only the objective has a gradient.

    hidden [N, d], the same on all ranks; weight [v_shard, d], of the tokens from vocab_start on; targets [N] int64:
    IGNORE_INDEX is not scored, and any other target outside the vocabulary makes the loss NaN. The objective adds
    z_loss_weight log(Z)^2 per token. The gradient of hidden is this rank's term of a sum, so hidden must come from
    copy_to_group or all_gather_sequence. Softmax is computed in float32, products in hidden's dtype.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    result: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(
        hidden, weight, targets, vocab_start, group, z_loss_weight, kernels, needs_grad
    )
    return result
