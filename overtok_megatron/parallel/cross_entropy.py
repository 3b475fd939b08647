"""Output projection and cross entropy in one pass, chunk by chunk, so that the logits of few tokens exist at once.

The vocabulary may be split over the ranks of a group, which see the same tokens. Shapes: N tokens, c tokens of a chunk,
d hidden, v_shard this rank's part of the vocabulary, R ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from overtok_megatron.config.constants import IGNORE_INDEX
from overtok_megatron.kernels import reference
from overtok_megatron.kernels.choice import Kernels
from overtok_megatron.parallel.collectives import group_rank, group_size
from overtok_megatron.parallel.spans import profiler_span
from overtok_megatron.parallel.splits import largest_part


class ChunkBound(NamedTuple):
    """How large the logits [c, columns] of a chunk may be on a rank.

    values: most logits, of the largest shard. tokens: most tokens. even: cut the tokens into chunks of about one size, instead
    of full chunks and a rest. multiple: v_shard is rounded up to a multiple of this number, which gives the columns.
    """

    values: int
    tokens: int
    even: bool
    multiple: int

    def columns(self, shard: int) -> int:
        return -(-shard // self.multiple) * self.multiple

    def chunk_tokens(self, tokens: int, largest_shard: int) -> int:
        """Tokens per chunk, at least 1: also where the logits of one token are more than `values`."""
        most = max(1, min(self.tokens, self.values // max(1, self.columns(largest_shard))))
        if not self.even:
            return most
        return max(1, -(-tokens // max(1, -(-tokens // most))))


def chunk_bound(device_type: str, dtype: torch.dtype) -> ChunkBound:
    """The bound for a device: on a CPU what its cache holds, else 8192 tokens and 1 GiB of logits in `dtype`.

    On a CPU the passes over logits find them in the cache. On a GPU a product needs thousands of tokens, because it reads the
    weight, and reads and writes the weight's gradient in float32, once per chunk. There, rows are whole multiples of 16 bytes:
    the fast products of NVIDIA's libraries load 16 bytes at a time (docs.nvidia.com, "Matrix Multiplication Background").
    """
    if device_type == "cpu":
        return ChunkBound(values=1 << 22, tokens=1 << 22, even=False, multiple=1)
    return ChunkBound(values=(1 << 30) // dtype.itemsize, tokens=8192, even=True, multiple=max(1, 16 // dtype.itemsize))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the loss and both gradients of a chunk while its logits exist; backward only scales the gradients.

    | | hidden [N, d] | weight [v_shard, d] | of each token [3, c]: max, sum of exp, target logit |
    | forward | the same on all ranks | own part | all-gathered |
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
        bound: ChunkBound,
    ) -> tuple[Tensor, Tensor]:
        tokens, shard = hidden.shape[0], weight.shape[0]
        # From the largest shard, because ranks with other chunks would hang in the collectives of a chunk.
        step = bound.chunk_tokens(tokens, largest_part(vocab_start, vocab_start + shard, group_rank(group)))
        padded = _padded_rows(weight, bound.columns(shard))  # [columns, d]
        room = hidden.new_empty(min(step, tokens), padded.shape[0])  # one for all chunks: two never exist at once
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        total = _empty_total(padded, tokens) if needs_grad else None
        objective = torch.zeros((), dtype=torch.float32, device=hidden.device)
        cross_entropy = torch.zeros_like(objective)
        for start in range(0, tokens, step):
            chunk = slice(start, min(start + step, tokens))
            scored = targets[chunk] != IGNORE_INDEX
            # Out of range where the target is in another rank's part, or is not scored.
            local_target = torch.where(scored, targets[chunk] - vocab_start, -1)
            logits = torch.mm(hidden[chunk], padded.t(), out=room[: chunk.stop - start])  # [c, columns]
            logits[:, shard:].fill_(-torch.inf)  # columns that are not in the vocabulary
            log_sum, target_logit = _loss_parts(
                logits, local_target, scored, z_loss_weight, group=group, kernels=kernels, needs_grad=needs_grad
            )
            loss = torch.where(scored, log_sum - target_logit, 0.0).sum()
            cross_entropy += loss
            objective += loss + z_loss_weight * torch.where(scored, log_sum, 0.0).square().sum()
            if grad_hidden is not None and total is not None:
                grad_logits = logits  # overwritten by their gradient
                torch.mm(grad_logits, padded, out=grad_hidden[chunk])
                _add_product(total, grad_logits.t(), hidden[chunk], first=start == 0)
        if grad_hidden is not None and total is not None:
            ctx.save_for_backward(grad_hidden, total[:shard])
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, total = ctx.saved_tensors
        # `grad` is a float32 scalar: rounding it to bfloat16 first would scale the head's gradient unlike all others. What
        # was saved is overwritten, so that a second backward pass through this function raises RuntimeError.
        return (grad_hidden.mul_(grad), _scaled(total, grad, grad_hidden.dtype), *[None] * 7)


def _padded_rows(weight: Tensor, rows: int) -> Tensor:
    """weight [v_shard, d] with rows of zeros below it, [rows, d]; a copy only where there are any."""
    if rows == weight.shape[0]:
        return weight
    return torch.cat([weight, weight.new_zeros(rows - weight.shape[0], weight.shape[1])])


def _empty_total(weight: Tensor, tokens: int) -> Tensor:
    """Room for the sum of products that is the gradient of `weight`, in float32; zeros where there are no tokens."""
    make = torch.empty_like if tokens else torch.zeros_like
    return make(weight, dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total [m, n] float32 += left [m, k] @ right [k, n]; first: total holds nothing yet, and is written without being read.

    The product itself adds in float32 where torch has that: on CUDA for any dtype (the overload with out_dtype), elsewhere
    where the factors are float32 too. Otherwise the product [m, n] exists beside the total, rounded to the factors' dtype.
    """
    if left.dtype == torch.float32:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    elif left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


def _scaled(total: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """total [v_shard, d] float32 times the scalar, in `dtype`: in one pass, and in place where the dtypes are the same."""
    out = total if dtype == total.dtype else torch.empty_like(total, dtype=dtype)
    return torch.mul(total, grad, out=out)


def _loss_parts(
    logits: Tensor,
    local_target: Tensor,
    scored: Tensor,
    z_loss_weight: float,
    *,
    group: dist.ProcessGroup | None,
    kernels: Kernels,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """log-sum-exp and target logit over the full vocabulary, [c] float32 each; needs_grad: logits become their gradient.

    local_target [c]: index of the target in this rank's shard; out of range = the target is not here.
    """
    if needs_grad and group_size(group) == 1:
        log_sum, target_logit = kernels.softmax_loss_and_gradient(logits, local_target, scored, z_loss_weight)
    else:
        largest, exp_sum = kernels.softmax_statistics(logits)
        own = torch.stack([largest, exp_sum, reference.target_logits(logits, local_target)])
        log_sum, target_logit = _over_ranks(own, group)
        if needs_grad:
            # d objective / d logits = softmax (1 + 2 z_loss_weight log_sum) - [target], zero where not scored
            scale = reference.loss_scale(scored, log_sum, z_loss_weight)
            kernels.softmax_gradient(logits, log_sum, scale, local_target)
    # A target that no rank holds is outside the vocabulary; the loss becomes NaN, so that nobody takes it for a result.
    return log_sum, torch.where(target_logit == -torch.inf, torch.nan, target_logit)


def _over_ranks(own: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """[3, c] of each rank: maximum, sum of exp, target logit -> log-sum-exp and target logit over all ranks, [c] each.

    All ranks must call this. Every rank combines the same numbers in rank order, so that all have the same bits.
    """
    parts = own.unsqueeze(0)
    if group is not None:
        parts = own.new_empty(group_size(group), *own.shape)  # [R, 3, c]
        with profiler_span("all-gather of softmax statistics", group):
            dist.all_gather(list(parts.unbind()), own, group=group)
    largest, exp_sum, target_logit = parts.unbind(1)  # [R, c] each
    top = largest.amax(dim=0)
    return (exp_sum * (largest - top).exp()).sum(dim=0).log() + top, target_logit.amax(dim=0)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    z_loss_weight: float = 0.0,
    kernels: Kernels,
    bound: ChunkBound | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed objective and summed cross entropy in nats, float32 scalars; only the objective has a gradient.

    hidden [N, d], the same on all ranks; weight [v_shard, d], of the tokens from vocab_start on; targets [N] int64:
    IGNORE_INDEX is not scored, and any other target outside the vocabulary makes the loss NaN. The objective adds
    z_loss_weight log(Z)^2 per token. The gradient of hidden is this rank's term of a sum, so hidden must come from
    copy_to_group or all_gather_sequence. Softmax is computed in float32, products in hidden's dtype.

    bound: of the logits of a chunk, the same on all ranks; None = that of the device, see chunk_bound. Nothing here waits for
    the device. Where a gradient is wanted, forward takes memory for the logits of one chunk, for the weight's gradient in
    float32, and for hidden's in its dtype. Besides these there are vectors [c]; a copy of the weight where v_shard is not a
    multiple of bound.multiple; without CUDA and outside of float32, one chunk's product for the weight's gradient in hidden's
    dtype; and in torch's form of the softmax passes, float32 copies of the chunk. Backward no longer has the logits. It makes
    the weight's gradient in its own dtype while the float32 one still exists (and on a CPU a float32 copy of that).
    """
    if bound is None:
        bound = chunk_bound(hidden.device.type, hidden.dtype)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    result: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(
        hidden, weight, targets, vocab_start, group, z_loss_weight, kernels, needs_grad, bound
    )
    return result
