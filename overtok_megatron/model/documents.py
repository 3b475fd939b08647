"""Which document a position of a packed sample is of, and the mask that keeps attention within it.

Shapes: b batch, s sequence.
"""

import torch
from torch import Tensor

from overtok_megatron.kernels.reference import window_mask


def document_ids(tokens: Tensor, end: int) -> Tensor:
    """tokens [b, s] int64 -> [b, s] int64, equal within a document, rising along s.

    The token `end` is of the document that it ends, as for n-grams.
    """
    ends = (tokens == end).long()
    return ends.cumsum(dim=1) - ends


def document_mask(documents: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """documents [b, s] int64 -> [b, 1, s, s] of `dtype`, added to scores: 0 for the positions of its own document that
    each sees, -inf for all others. window: how many it sees, its own included; None = all before it.

    In numbers because torch makes these out of booleans in every layer, and keeps each layer's until backward.
    """
    length = documents.shape[1]
    hidden = documents.unsqueeze(2) != documents.unsqueeze(1)  # [b, s, s]
    hidden |= ~window_mask(length, length, length if window is None else window, documents.device)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -torch.inf).unsqueeze(1)
