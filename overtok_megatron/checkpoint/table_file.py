"""What the name of a table file says: which rows it holds, and whether all of them or only what one save changed."""

import re
from dataclasses import dataclass

FOLDER = "tables"  # of a checkpoint, with the files of its n-gram tables
_FULL, _CHANGED = "rows", "changed"
_NAME = re.compile(rf"{FOLDER}/(?:{_FULL}|{_CHANGED}-([0-9]+))-([0-9]+)-([0-9]+)\.safetensors")


@dataclass(frozen=True, order=True)
class TableFile:
    """A file with rows [start, stop) of the row space. Files sort in the order in which they apply.

    increment: 0 = all rows of the range; n = only those that changed between the (n - 1)-th and the n-th incremental save.
    """

    increment: int
    start: int
    stop: int

    @classmethod
    def full(cls, start: int, stop: int) -> "TableFile":
        """The file with all rows of [start, stop)."""
        return cls(0, start, stop)

    @property
    def is_full(self) -> bool:
        return self.increment == 0

    @property
    def name(self) -> str:
        """The file's name in its checkpoint's folder."""
        kind = _FULL if self.is_full else f"{_CHANGED}-{self.increment:04d}"
        return f"{FOLDER}/{kind}-{self.start:012d}-{self.stop:012d}.safetensors"

    @classmethod
    def parse(cls, name: str) -> "TableFile | None":
        """What the name of a file in a checkpoint's folder says; None where it is not the name of a table file."""
        found = _NAME.fullmatch(name)
        return None if found is None else cls(*(int(number or 0) for number in found.groups()))
