"""Output projection and cross entropy in one pass over a vocabulary that may be split; logits never exist as a whole.

Shapes: N tokens, c tokens of a chunk, d hidden, v_shard this rank's part of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_VALUES = 1 << 22  # logits of a chunk: few enough to stay near the cache, enough for a full-speed product
IGNORED = -100


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients of a chunk while its logits are at hand; backward only scales them.

    | | hidden [N, d] | weight [v_shard, d] | max, sum of exp, target logit [c] |
    | forward | the same on all ranks | own part | all-reduced |
    | backward | own part of the gradient: the caller's copy or gather sums it | own | - |
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_start: int,
        group: dist.ProcessGroup | None,
        z_loss: float,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        objective = torch.zeros((), dtype=torch.float32, device=hidden.device)
        cross_entropy = torch.zeros_like(objective)
        step = max(1, _CHUNK_VALUES // max(1, weight.shape[0]))
        for begin in range(0, hidden.shape[0], step):
            chunk = slice(begin, begin + step)
            logits = (hidden[chunk] @ weight.t()).float()  # [c, v_shard]
            log_sum, target_logit, scored, place = _statistics(logits, targets[chunk], vocab_start, group)
            losses = torch.where(scored, log_sum - target_logit, 0.0)
            squares = torch.where(scored, log_sum, 0.0).square()
            cross_entropy += losses.sum()
            objective += losses.sum() + z_loss * squares.sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d objective / d logits = softmax (1 + 2 z log_sum) - [target], zero where not scored
            scale = torch.where(scored, 1.0 + 2.0 * z_loss * log_sum, 0.0)
            probabilities = logits.sub_(log_sum.unsqueeze(1)).exp_().mul_(scale.unsqueeze(1))
            if weight.shape[0]:
                ours = scored & (place >= 0) & (place < weight.shape[0])
                probabilities.scatter_add_(1, torch.where(ours, place, 0).unsqueeze(1), -ours.float().unsqueeze(1))
            grad_logits = probabilities.to(hidden.dtype)
            grad_hidden[chunk] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[chunk]
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # torch: *Any
        grad_hidden, grad_weight = ctx.saved_tensors
        # a float32 scalar: rounding it to bfloat16 first would tilt the head's gradient against all others
        return (grad_hidden * grad, grad_weight * grad, *[None] * 5)


def _statistics(
    logits: Tensor, targets: Tensor, vocab_start: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-sum-exp [c], target logit [c] over the whole vocabulary, which targets count, and their place in the shard."""
    scored = targets != IGNORED
    place = targets - vocab_start
    size = logits.shape[1]
    if group is None:
        target_logit = logits.gather(1, torch.where(scored, place, 0).unsqueeze(1)).squeeze(1)
        return logits.logsumexp(dim=1), target_logit, scored, place
    largest = logits.amax(dim=1) if size else logits.new_full((logits.shape[0],), float("-inf"))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    ours = scored & (place >= 0) & (place < size)
    found = logits.gather(1, torch.where(ours, place, 0).unsqueeze(1)).squeeze(1) if size else torch.zeros_like(largest)
    sums = torch.stack([(logits - largest.unsqueeze(1)).exp_().sum(dim=1), torch.where(ours, found, 0.0)])
    dist.all_reduce(sums, group=group)
    return sums[0].log() + largest, sums[1], scored, place


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Summed objective and summed cross entropy, float32 scalars; only the objective has a gradient.

    hidden [N, d], the same on all ranks; weight [v_shard, d], rows from vocab_start on; targets [N] int64, IGNORED =
    not scored. The objective adds z_loss log(Z)^2 a token. The gradient of hidden is this rank's part: enter through
    copy_to_group or all_gather_sequence. Softmax is float32, products run in hidden's dtype.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    result: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(
        hidden, weight, targets, vocab_start, group, z_loss, needs_grad
    )
    return result
