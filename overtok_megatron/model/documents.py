"""To which document each position of a packed sample belongs, and the mask that keeps attention within documents.

Shapes: b batch, s sequence.
"""

import torch
from torch import Tensor

from overtok_megatron.kernels.reference import window_mask


def document_ids(tokens: Tensor, end: int) -> Tensor:
    """tokens [b, s] int64 -> [b, s] int64: a number per document, rising along s.

    The token `end` belongs to the document that it ends, as for n-grams.
    """
    ends = (tokens == end).long()
    return ends.cumsum(dim=1) - ends


def document_mask(documents: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """documents [b, s] int64 -> [b, 1, s, s] of `dtype`, to be added to attention scores.

    0 where a position sees another one of its own document, else -inf. window: how many positions each sees, its own
    included; None = all before it. The mask is not boolean, because torch would convert a boolean mask in every layer and
    keep each layer's result until backward.
    """
    length = documents.shape[1]
    hidden = documents.unsqueeze(2) != documents.unsqueeze(1)  # [b, s, s]
    hidden |= ~window_mask(length, length, length if window is None else window, documents.device)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, -torch.inf).unsqueeze(1)
