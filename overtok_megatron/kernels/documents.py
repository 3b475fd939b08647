"""Which positions of a micro-batch are of one document, as attention within documents needs it."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

Derived = TypeVar("Derived")


class Documents:
    """ids int64 [b, s], the document of each position, rising along s; with what attention derives from them, such as masks.

    Attention of one window needs the same mask in every layer, and again where backward computes a layer again. It is made by
    the first of these and kept here until the micro-batch ends.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._derived: dict[Hashable, Any] = {}

    def derive(self, make: Callable[..., Derived], *arguments: Hashable) -> Derived:
        """`make(ids, *arguments)`, computed at the first call with these arguments."""
        key = (make, *arguments)
        if key not in self._derived:
            self._derived[key] = make(self.ids, *arguments)
        derived: Derived = self._derived[key]
        return derived
