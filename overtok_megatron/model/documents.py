"""To which document each position of a packed sample belongs: attention may stay within it.

Shapes: b batch, s sequence.
"""

from torch import Tensor


def document_ids(tokens: Tensor, end: int) -> Tensor:
    """tokens [b, s] int64 -> [b, s] int64: a number per document, rising along s.

    The token `end` belongs to the document that it ends, as for n-grams.
    """
    ends = (tokens == end).long()
    return ends.cumsum(dim=1) - ends
