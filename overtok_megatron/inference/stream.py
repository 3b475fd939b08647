"""Text in pieces, as its tokens come: without half characters, and nothing after a stop string. The pieces joined are the text
that decoding all tokens at once gives.

The text of tokens after a prompt is what decoding both adds to decoding the prompt alone: many tokenizers leave out the space
that begins a text, and the bytes of one character may be in both parts.

The cost of a token does not grow with the text. Only open tokens, whose text may still change, are decoded again, after one
fixed token (the anchor) that replaces all tokens before them. This is right because decoders treat only two things specially:
the begin of a text, and the bytes of one character. Once a text has begun and its last character is complete, what follows is
spelled the same after any other such text. Where that does not hold, the tokenizer says so (`Tokenizer.undecided`), and the
tokens stay open.
"""

from collections.abc import Sequence

from overtok_megatron.data.tokenizers.protocol import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes decode to that are not (yet) a complete character
_CHARACTER = 8  # tokens at the end of a text that are decoded to tell whether its last character is complete
_BACK = 64  # tokens of a prompt, counted from its end, after which a complete text is looked for
_SHORT = (
    32  # up to so many open tokens are decoded again with each new one; more only when they have grown by an eighth
)


class TextStream:
    """The text of one sequence of generated tokens. Text is held back while it could still change or begin a stop string.

    The text has three parts: `_finished`, which no stop string can reach any more; `_recent`, the last characters that will not
    change; and `_unsettled`, which may change with the next tokens. Many open tokens in a row (bytes that spell nothing) are
    decoded less often: `length`, and a stop string among them, may then be late by an eighth of them. After `finish`, text and
    length are exact.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        prompt: Sequence[int] = (),
        *,
        whole_characters: bool = False,
    ) -> None:
        """prompt: tokens before the first; their text is left out. whole_characters: a character that the prompt only begins
        is part of this text, whether it becomes complete or not."""
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._reach = max(map(len, self._stops), default=1) - 1  # most characters of a stop string that is not complete
        self._anchor = _find_anchor(tokenizer)  # (token, characters of its text)
        self._context: list[int] = []  # decoded before the open tokens: the prompt, or nothing; later the anchor
        self._context_size = (
            0  # characters of the decoded text to leave out: the anchor's, and those that will not change
        )
        self._prompt_text = ""  # what `_context` alone spells after those characters
        self._prompt_has_text = False
        self._open_tokens: list[int] = []
        self._num_decoded = 0  # open tokens that were decoded last time
        self._finished: list[str] = []
        self._recent = ""  # at most `_reach` characters between two calls
        self._num_sent = 0  # characters of `_recent` that were returned already
        self._unsettled = ""
        self.length = 0  # characters of the text
        self.stopped = False
        if prompt:
            self._begin_after(list(prompt), whole_characters)

    @property
    def text(self) -> str:
        """The whole text, up to the stop string where there is one."""
        return "".join([*self._finished, self._recent, self._unsettled])

    def add(self, token: int) -> str:
        """The text that the next token makes certain; sets `stopped` where a stop string is complete."""
        assert not self.stopped
        self._open_tokens.append(token)
        size = len(self._open_tokens)
        if size > _SHORT and 8 * (size - self._num_decoded) < size:
            return ""
        return self._read()

    def finish(self) -> str:
        """The text that was held back, when no more tokens come; a character that stayed incomplete is U+FFFD."""
        piece = self._read() if self._num_decoded < len(self._open_tokens) else ""
        if not self.stopped:
            self._recent, self._unsettled = self._recent + self._unsettled, ""
        return piece + self._send(len(self._recent))

    def _read(self) -> str:
        """Decode the open tokens, look for stop strings, and return the text that has become certain."""
        self._num_decoded = len(self._open_tokens)
        spelled = self._tokenizer.decode(self._context + self._open_tokens)[self._context_size :]
        complete = not spelled.endswith(_REPLACEMENT)  # else the last character may be incomplete
        shared = _num_shared(self._prompt_text, spelled)
        spelled = spelled[shared:]
        self.length += len(spelled) - len(self._unsettled)
        self._unsettled = spelled
        found = [index for stop in self._stops if (index := self._find(stop)) >= 0]
        if found:
            self.stopped = True
            whole = self._recent + self._unsettled
            self._recent, self._unsettled = whole[: min(found)], ""
            self.length -= len(whole) - min(found)
            return self._send(len(self._recent))
        if self._open_tokens and not self._tokenizer.undecided(self._open_tokens[-1]):
            self._settle(len(self._unsettled.rstrip(_REPLACEMENT)), shared, complete)
        piece = self._send(len(self._recent) - self._stop_begun())
        out_of_reach = max(0, len(self._recent) - self._reach)
        if out_of_reach:
            self._finished.append(self._recent[:out_of_reach])
            self._recent, self._num_sent = self._recent[out_of_reach:], self._num_sent - out_of_reach
        return piece

    def _settle(self, size: int, shared: int, complete: bool) -> None:
        """The first `size` unsettled characters will not change; where these are all, the tokens are no longer open.

        shared: characters of the prompt before them. complete: whether the last character is complete.
        """
        self._recent += self._unsettled[:size]
        self._unsettled = self._unsettled[size:]
        if size:
            self._context_size += shared + size
            self._prompt_text = ""
        if complete and not self._unsettled and (self.length or self._prompt_has_text) and self._anchor is not None:
            token, self._context_size = self._anchor
            self._context, self._open_tokens, self._num_decoded, self._prompt_text = [token], [], 0, ""

    def _begin_after(self, prompt: list[int], whole_characters: bool) -> None:
        """Keep only those tokens of a prompt whose text may change with the tokens after it; the anchor replaces the others."""
        end = _complete_end(self._tokenizer, prompt) if self._anchor is not None else 0
        self._prompt_has_text = bool(self._tokenizer.decode(prompt[:end] if end else prompt))
        if end and self._prompt_has_text and self._anchor is not None:
            token, self._context_size = self._anchor
            self._context = [token, *prompt[end:]]
        else:
            self._context = prompt
        self._prompt_text = self._tokenizer.decode(self._context)[self._context_size :]
        whole = self._prompt_text.rstrip(_REPLACEMENT)
        if whole_characters and whole != self._prompt_text:
            self._prompt_text, self._num_decoded = whole, -1  # a part of this text is there before its first token

    def _find(self, stop: str) -> int:
        """The index of `stop` in `_recent + _unsettled`, or -1; `_recent` alone never contains it."""
        begin = max(0, len(self._recent) - len(stop) + 1)
        index = (self._recent[begin:] + self._unsettled).find(stop)
        return index if index < 0 else begin + index

    def _stop_begun(self) -> int:
        """Length of the longest suffix of `_recent` with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            begin = self._recent.find(stop[0], max(0, len(self._recent) - len(stop) + 1))
            while begin >= 0 and not stop.startswith(self._recent[begin:]):
                begin = self._recent.find(stop[0], begin + 1)
            if begin >= 0:
                longest = max(longest, len(self._recent) - begin)
        return longest

    def _send(self, end: int) -> str:
        """The characters of `_recent` before `end` that were not returned before."""
        piece = self._recent[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return piece


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens after a prompt: what decoding both gives beyond what it shares with the prompt's own text."""
    both = tokenizer.decode([*prompt, *tokens])
    return both[_num_shared(tokenizer.decode(list(prompt)), both) :]


def token_text(tokenizer: Tokenizer, token: int, *, begins: bool) -> str:
    """The text of a token at the begin of a text, or within one."""
    if not begins:
        before = tokenizer.encode("a")[-1:]
        text = tokenizer.decode(before)
        both = tokenizer.decode([*before, token])
        if text and both.startswith(text) and both != text:
            return both[len(text) :]
    return tokenizer.decode([token])


def _num_shared(first: str, second: str) -> int:
    """Length of the longest common prefix of two texts."""
    if second.startswith(first):
        return len(first)
    differing = (index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(first), len(second)))


def _complete_end(tokenizer: Tokenizer, tokens: list[int]) -> int:
    """How many of the tokens, the last `_BACK` tried, spell a text that does not change with what follows; 0 = none found."""
    for end in range(len(tokens), max(0, len(tokens) - _BACK), -1):
        if tokenizer.undecided(tokens[end - 1]):
            continue
        if not tokenizer.decode(tokens[max(0, end - _CHARACTER) : end]).endswith(_REPLACEMENT):
            return end
    return 0


def _find_anchor(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """A token that spells a complete text, and the number of its characters; None where no tried letter is such a token."""
    for letter in "a0.":
        token = tokenizer.encode(letter)[-1]
        text = tokenizer.decode([token])
        if text.strip() and _REPLACEMENT not in text and not tokenizer.undecided(token):
            return token, len(text)
    return None
