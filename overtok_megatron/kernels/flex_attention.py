"""Causal attention on CUDA without a tensor of s x s elements, also with sliding windows and within documents.

torch's FlexAttention reads a block mask: which blocks of 128 x 128 scores are hidden, partly visible, or visible in full. It
skips hidden blocks, so a window costs as much per token at any length. Plain causal attention stays with torch's flash kernels.
torch.nn.attention.varlen_attn is deliberately not used: it takes the cumulative lengths of the documents, whose number only the
device knows (a wait per micro-batch), it does not support float32, and in torch 2.11 it does not accept shared heads.

Backward of FlexAttention exists on CUDA only; its forward also on a CPU, where tests compare it with reference.py.

Shapes: b batch, s sequence, h query heads, g key/value heads, e head size, n blocks of 128 positions (the last may be shorter).
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from overtok_megatron.kernels import reference
from overtok_megatron.kernels.documents import Documents

_BLOCK = 128  # torch's own default; its kernels take tiles that divide it
_SMALLEST_HEAD = 16  # for a product in Triton
# One entry is compiled per kind of shape: training or not, one sequence or several, one block or several, this length or any.
# torch allows 8 entries and then, because of `fullgraph`, raises; it never takes its eager form, which keeps all scores.
_MOST_ENTRIES = 64


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Documents | None = None
) -> Tensor:
    """`reference.causal_attention` for CUDA, with the same arguments and results.

    FlexAttention runs where a window hides something or documents are given. Heads smaller than 16, and tensors that are not
    on CUDA, take the dense masks of reference.py.
    """
    batch, _, length, head_size = q.shape
    hides = documents is not None or (window is not None and window < length)
    if not hides or head_size < _SMALLEST_HEAD or q.device.type != "cuda":
        return reference.causal_attention(q, k, v, window, documents)
    if documents is None:
        assert window is not None
        return masked_attention(q, k, v, window_block_mask(batch, length, window, q.device))
    return masked_attention(q, k, v, documents.derive(document_block_mask, window))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """q [b, h, s, e], k and v [b, g, s, e] -> [b, h, s, e] by the compiled FlexAttention, also on a CPU without gradients."""
    with torch.compiler.config.patch(recompile_limit=_MOST_ENTRIES):  # type: ignore[attr-defined]
        # The backend is named: the one for short sequences would be one more kernel, chosen by the length.
        mixed: Tensor = _compiled()(
            q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options={"BACKEND": "TRITON"}
        )
    return mixed


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """Compiled for the first length that comes, and for any length once there is a second one."""
    return torch.compile(flex_attention, fullgraph=True)


@lru_cache(maxsize=16)
def window_block_mask(batch: int, length: int, window: int, device: torch.device) -> BlockMask:
    """Kept, because all micro-batches have the same; a few, because evaluation has several lengths."""
    first = _window_starts(length, window, device)
    return _block_mask(first.expand(batch, length).contiguous())


def document_block_mask(ids: Tensor, window: int | None) -> BlockMask:
    """ids int64 [b, s], the document of each position, rising along s. Waits for nothing on the device."""
    first = torch.searchsorted(ids, ids)  # where each position's document begins
    if window is not None:
        first = first.maximum(_window_starts(ids.shape[1], window, ids.device))
    return _block_mask(first)


def _window_starts(length: int, window: int, device: torch.device) -> Tensor:
    """int64 [s]: the first position that each position sees."""
    return torch.arange(1 - window, length + 1 - window, device=device).clamp_(min=0)


def _block_mask(first: Tensor) -> BlockMask:
    """first int64 [b, s]: each position sees itself and those before it from first[position] on; never falls along s.

    Because `first` never falls, the first and the last query of a block say what the block sees: `create_block_mask` of torch
    finds the same from all s x s pairs.
    """
    length = first.shape[1]
    blocks = torch.arange(-(-length // _BLOCK), device=first.device)
    begins, ends = blocks * _BLOCK, (blocks * _BLOCK + _BLOCK - 1)  # of a block, both included
    before = blocks < blocks.unsqueeze(1)  # [n, n]: keys before queries
    seen_by_one = first[:, ::_BLOCK].unsqueeze(2) <= ends  # [b, n, n]: queries, keys
    seen_by_all = first[:, ends.clamp(max=length - 1)].unsqueeze(2) <= begins
    whole = (ends < length).unsqueeze(1)  # in a block that ends early, torch's kernels must look at the mask
    full = before & seen_by_all & whole
    partial = (before & seen_by_one & ~full) | torch.eye(len(blocks), dtype=torch.bool, device=first.device)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[b, query])

    starts = first.int()
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """blocks bool [b, n, n] -> their number [b, 1, n] and their columns, in rising order and then the others, [b, 1, n, n]."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32).unsqueeze(1), columns.int().unsqueeze(1)
