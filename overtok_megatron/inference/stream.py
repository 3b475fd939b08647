"""Text as its tokens come: no half characters, nothing behind a stop string, and in all what decoding at once would give.

The cost of a token does not grow with the text. Only tokens whose text may still change are decoded again, behind one fixed
token that stands for all before them: once a text has begun and is whole so far, what follows is spelled the same behind any
other whole text (decoders treat the begin of a text apart, and bytes of one character belong together; nothing else in it
reaches further). Where that is not so, the tokenizer says so (`Tokenizer.undecided`), and the tokens stay open.
"""

from collections.abc import Sequence

from overtok_megatron.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes decode to that are no whole character (yet)
_SHORT = 32  # open tokens that are decoded again at each; more are only once they are an eighth more


class TextStream:
    """The text of one sequence of generated tokens. Text is held back while it could still change or begin a stop string.

    The text is in three parts: what a stop string can no longer touch, the last certain characters, and what may change.
    Tokens that stay undecided for long (bytes that spell nothing) are looked at less often: `length`, and a stop string among
    them, may then be an eighth of them late. After `finish`, text and length are exact.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._reach = max(map(len, self._stops), default=1) - 1  # characters that the longest begun stop string takes
        self._stand_in = _stand_in(tokenizer)
        self._before: list[int] = []  # at the begin of the text nothing, then the stand-in
        self._skip = 0  # characters of the decoded text that are not open: the stand-in's, and certain ones
        self._open: list[int] = []
        self._decoded = 0  # of the open tokens
        self._done: list[str] = []
        self._near = ""  # certain too, at most `_reach` characters
        self._sent = 0  # of `_near`
        self._loose = ""
        self.length = 0  # characters of the text
        self.stopped = False

    @property
    def text(self) -> str:
        """All of it, up to the stop string where one came."""
        return "".join([*self._done, self._near, self._loose])

    def add(self, token: int) -> str:
        """What the next token adds that is certain; `stopped` is then set if a stop string is complete."""
        assert not self.stopped
        self._open.append(token)
        size = len(self._open)
        if size > _SHORT and 8 * (size - self._decoded) < size:
            return ""
        return self._read()

    def finish(self) -> str:
        """What was held back, at the end of the tokens; a character that stayed incomplete comes as U+FFFD."""
        piece = self._read() if self._decoded < len(self._open) else ""
        if not self.stopped:
            self._near, self._loose = self._near + self._loose, ""
        return piece + self._send(len(self._near))

    def _read(self) -> str:
        """Decode the open tokens, look for stop strings, and send what is certain."""
        self._decoded = len(self._open)
        spelled = self._tokenizer.decode(self._before + self._open)[self._skip :]
        self.length += len(spelled) - len(self._loose)
        self._loose = spelled
        places = [self._find(stop) for stop in self._stops]
        ends = [place for place in places if place >= 0]
        if ends:
            self.stopped = True
            whole = self._near + self._loose
            self._near, self._loose = whole[: min(ends)], ""
            self.length -= len(whole) - min(ends)
            return self._send(len(self._near))
        if not self._tokenizer.undecided(self._open[-1]):
            self._settle(len(self._loose.rstrip(_REPLACEMENT)))  # the end may be a part of a character
        piece = self._send(len(self._near) - self._begun())
        far = max(0, len(self._near) - self._reach)
        if far:
            self._done.append(self._near[:far])
            self._near, self._sent = self._near[far:], self._sent - far
        return piece

    def _settle(self, size: int) -> None:
        """The first `size` characters that are loose are certain; where that is all, the tokens are open no more."""
        self._near += self._loose[:size]
        self._loose = self._loose[size:]
        self._skip += size
        if not self._loose and self.length and self._stand_in is not None:
            token, self._skip = self._stand_in
            self._before, self._open, self._decoded = [token], [], 0

    def _find(self, stop: str) -> int:
        """Where `stop` is within what is near and loose, or -1; there is none in what is near alone."""
        begin = max(0, len(self._near) - len(stop) + 1)
        place = (self._near[begin:] + self._loose).find(stop)
        return place if place < 0 else begin + place

    def _begun(self) -> int:
        """Length of the longest end of the certain text with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            begin = self._near.find(stop[0], max(0, len(self._near) - len(stop) + 1))
            while begin >= 0 and not stop.startswith(self._near[begin:]):
                begin = self._near.find(stop[0], begin + 1)
            if begin >= 0:
                longest = max(longest, len(self._near) - begin)
        return longest

    def _send(self, end: int) -> str:
        piece = self._near[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


def _stand_in(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """A token that is a whole text, and its characters; None where the tokenizer has none of those that are tried."""
    for letter in "a0.":
        token = tokenizer.encode(letter)[-1]
        text = tokenizer.decode([token])
        if text.strip() and _REPLACEMENT not in text and not tokenizer.undecided(token):
            return token, len(text)
    return None
