"""How messages about a configuration are worded: one printable line, at most LONGEST_LINE characters, long parts cut."""

LONGEST_LINE = 290  # "error: " comes before it
_LONGEST_VALUE = 80
_LONGEST_ORIGIN = 120


def short(text: str, longest: int = _LONGEST_VALUE) -> str:
    """A text on one line, what a terminal cannot show written as escapes, cut after `longest` characters."""
    text = printable(" ".join(text[: 4 * longest].split()))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def line(origin: object, text: str) -> str:
    """The message "origin: text". A long origin loses its beginning: the end says which file and line."""
    where = short(str(origin)[-4 * _LONGEST_ORIGIN :], 8 * _LONGEST_ORIGIN)
    if len(where) > _LONGEST_ORIGIN:
        where = f"...{where[3 - _LONGEST_ORIGIN :]}"
    return f"{where}: {short(text, LONGEST_LINE - len(where) - 2)}"


def printable(text: str) -> str:
    """A text in which characters that a terminal cannot show are escapes."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
