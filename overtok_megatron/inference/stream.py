"""Text in pieces as its tokens come: no half characters, nothing after a stop string, together the text of decoding at once.

The text of tokens after a prompt is what decoding both adds to decoding the prompt alone: many tokenizers leave out the space
that begins a text, and the bytes of one character may be in both parts.

The cost of a token does not grow with the text. Only tokens whose text may still change are decoded again, behind one fixed
token that stands for all before them: once a text has begun and is whole so far, what follows is spelled the same behind any
other whole text (decoders treat the begin of a text apart, and bytes of one character belong together; nothing else in it
reaches further). Where that is not so, the tokenizer says so (`Tokenizer.undecided`), and the tokens stay open.
"""

from collections.abc import Sequence

from overtok_megatron.data.tokenizers.protocol import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes decode to that are no whole character (yet)
_CHARACTER = 8  # tokens at the end of a text that are looked at to tell whether its last character is whole
_BACK = 64  # tokens of a prompt that are tried, from its end, as the end of a whole text
_SHORT = 32  # open tokens that are decoded again at each; more are only once they are an eighth more


class TextStream:
    """The text of one sequence of generated tokens. Text is held back while it could still change or begin a stop string.

    The text is in three parts: what a stop string can no longer touch, the last certain characters, and what may change.
    Tokens that stay undecided for long (bytes that spell nothing) are looked at less often: `length`, and a stop string among
    them, may then be an eighth of them late. After `finish`, text and length are exact.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        prompt: Sequence[int] = (),
        *,
        whole_characters: bool = False,
    ) -> None:
        """prompt: tokens before the first, whose text is left out; whole_characters: but for a character that they only begin,
        which is then part of this text whether it becomes whole or not."""
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._reach = max(map(len, self._stops), default=1) - 1  # characters that the longest begun stop string takes
        self._stand_in = _stand_in(tokenizer)
        self._before: list[int] = []  # at the begin of the text nothing or the prompt, then the stand-in
        self._skip = 0  # characters of the decoded text that are not open: the stand-in's, and certain ones
        self._prompt = ""  # what the tokens in `_before` spell behind those characters without the open ones
        self._started = False  # by the prompt
        self._open: list[int] = []
        self._decoded = 0  # of the open tokens
        self._done: list[str] = []
        self._near = ""  # certain too, at most `_reach` characters
        self._sent = 0  # of `_near`
        self._loose = ""
        self.length = 0  # characters of the text
        self.stopped = False
        if prompt:
            self._begin_behind(list(prompt), whole_characters)

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
        complete = not spelled.endswith(_REPLACEMENT)  # else the end may be a part of a character
        shared = _shared(self._prompt, spelled)
        spelled = spelled[shared:]
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
        if self._open and not self._tokenizer.undecided(self._open[-1]):
            self._settle(len(self._loose.rstrip(_REPLACEMENT)), shared, complete)
        piece = self._send(len(self._near) - self._begun())
        far = max(0, len(self._near) - self._reach)
        if far:
            self._done.append(self._near[:far])
            self._near, self._sent = self._near[far:], self._sent - far
        return piece

    def _settle(self, size: int, shared: int, complete: bool) -> None:
        """The first `size` characters that are loose are certain; where that is all, the tokens are open no more.

        shared: characters of the prompt before them; complete: whether no character is begun.
        """
        self._near += self._loose[:size]
        self._loose = self._loose[size:]
        if size:
            self._skip += shared + size
            self._prompt = ""
        if complete and not self._loose and (self.length or self._started) and self._stand_in is not None:
            token, self._skip = self._stand_in
            self._before, self._open, self._decoded, self._prompt = [token], [], 0, ""

    def _begin_behind(self, prompt: list[int], whole_characters: bool) -> None:
        """The tokens of a prompt that may still change with those that follow; the stand-in for all before them."""
        end = _whole_end(self._tokenizer, prompt) if self._stand_in is not None else 0
        self._started = bool(self._tokenizer.decode(prompt[:end] if end else prompt))
        if end and self._started and self._stand_in is not None:
            token, self._skip = self._stand_in
            self._before = [token, *prompt[end:]]
        else:
            self._before = prompt
        self._prompt = self._tokenizer.decode(self._before)[self._skip :]
        whole = self._prompt.rstrip(_REPLACEMENT)
        if whole_characters and whole != self._prompt:
            self._prompt, self._decoded = whole, -1  # something of this text is there before its first token

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


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens behind a prompt: what decoding both gives beyond what it shares with the prompt's own text."""
    both = tokenizer.decode([*prompt, *tokens])
    return both[_shared(tokenizer.decode(list(prompt)), both) :]


def token_text(tokenizer: Tokenizer, token: int, *, begins: bool) -> str:
    """The text of a token at the begin of a text, or within one."""
    if not begins:
        before = tokenizer.encode("a")[-1:]
        text = tokenizer.decode(before)
        both = tokenizer.decode([*before, token])
        if text and both.startswith(text) and both != text:
            return both[len(text) :]
    return tokenizer.decode([token])


def _shared(first: str, second: str) -> int:
    """Characters that two texts have in common from their begin."""
    if second.startswith(first):
        return len(first)
    places = (place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(places, min(len(first), len(second)))


def _whole_end(tokenizer: Tokenizer, tokens: list[int]) -> int:
    """How many of the tokens spell a text that does not change with what follows, as far as is looked; 0 where none do."""
    for end in range(len(tokens), max(0, len(tokens) - _BACK), -1):
        if tokenizer.undecided(tokens[end - 1]):
            continue
        if not tokenizer.decode(tokens[max(0, end - _CHARACTER) : end]).endswith(_REPLACEMENT):
            return end
    return 0


def _stand_in(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """A token that is a whole text, and its characters; None where the tokenizer has none of those that are tried."""
    for letter in "a0.":
        token = tokenizer.encode(letter)[-1]
        text = tokenizer.decode([token])
        if text.strip() and _REPLACEMENT not in text and not tokenizer.undecided(token):
            return token, len(text)
    return None
