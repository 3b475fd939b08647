"""What became of every file and document that was seen: read, or left out with a reason, how often, and the first names."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from overtok_megatron.files import shown

_NAMES = 10  # of what is left out for one reason

Tallies = dict[str, tuple[int, list[str]]]  # reason -> (how many, the first of their names)


@dataclass
class LeftOut:
    """Things left out by reason. A reason is a phrase that stands behind a number, as `3 hidden`."""

    tallies: Tallies = field(default_factory=dict)

    def add(self, reason: str, name: object, count: int = 1) -> None:
        """Count `count` more things as left out for `reason`; `name` stands for them."""
        known, names = self.tallies.get(reason, (0, []))
        self.tallies[reason] = (known + count, names if len(names) == _NAMES else [*names, shown(name)])

    def merge(self, other: Tallies) -> None:
        for reason, (count, names) in other.items():
            known, before = self.tallies.get(reason, (0, []))
            self.tallies[reason] = (known + count, [*before, *names][:_NAMES])

    def with_others(self, other: "LeftOut") -> "LeftOut":
        """What is left out of either, with the names of this one first."""
        result = LeftOut(dict(self.tallies))
        result.merge(other.tallies)
        return result

    @property
    def total(self) -> int:
        return sum(count for count, _ in self.tallies.values())

    def reasons(self) -> str:
        """`4 left out (3 hidden, 1 without text)`."""
        if not self.total:
            return "none left out"
        parts = ", ".join(f"{count:,} {reason}" for reason, (count, _) in self.tallies.items())
        return f"{self.total:,} left out ({parts})"

    def lines(self, what: str) -> Iterable[str]:
        """A line for each reason with the first names. what: the kind of the things, such as `files`."""
        for reason, (count, names) in self.tallies.items():
            yield f"{what} left out, {reason}: {_listed(names, count)}"


@dataclass(kw_only=True)
class Account:
    """The account of a corpus. files: those that were left out, beside `num_read` whose text was read; documents likewise.

    unsplit: text files in which the separator does not occur, by the likely reason; num_texts: text files that were read.
    """

    num_read: int = 0
    files: LeftOut = field(default_factory=LeftOut)
    num_written: int = 0
    documents: LeftOut = field(default_factory=LeftOut)
    unsplit: LeftOut = field(default_factory=LeftOut)
    num_texts: int = 0

    def lines(self) -> list[str]:
        """What was left out, by name; the last line has the sums."""
        return [*self.file_lines(), *self.documents.lines("documents"), f"{self.file_sums()}; {self.document_sums()}"]

    def file_lines(self) -> list[str]:
        """The lines about whole files."""
        lines = list(self.files.lines("files"))
        for reason, (count, names) in self.unsplit.tallies.items():
            also = f" ({reason})" if reason else ""
            lines.append(
                f"the separator does not occur in {count:,} of {self.num_texts:,} text files, which are one document "
                f"each{also}: {_listed(names, count)}"
            )
        return lines

    def file_sums(self) -> str:
        return f"{self.num_read + self.files.total:,} files seen: {self.num_read:,} read, {self.files.reasons()}"

    def document_sums(self) -> str:
        seen = self.num_written + self.documents.total
        return f"{seen:,} documents seen: {self.num_written:,} written, {self.documents.reasons()}"


def _listed(names: list[str], count: int) -> str:
    return ", ".join(names) + (f", and others, {count:,} in all" if len(names) == _NAMES and count > _NAMES else "")
