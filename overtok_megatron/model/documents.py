"""Which document a position of a packed sample is of."""

from torch import Tensor


def document_ids(tokens: Tensor, end: int) -> Tensor:
    """tokens [b, s] int64 -> [b, s] int64, equal within a document, rising along s.

    The token `end` is of the document that it ends, as for n-grams.
    """
    ends = (tokens == end).long()
    return ends.cumsum(dim=1) - ends
