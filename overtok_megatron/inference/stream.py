"""Text as its tokens come: no half characters, nothing behind a stop string, and in all what decoding at once would give."""

from collections.abc import Sequence

from overtok_megatron.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what bytes decode to that are no whole character (yet)


class TextStream:
    """The text of one sequence of generated tokens. Text is held back while it could still change or begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._sent = 0  # characters
        self.text = ""  # all of it, up to the stop string where one came
        self.stopped = False

    def add(self, token: int) -> str:
        """What the next token adds that is certain; `stopped` is then set if a stop string is complete."""
        assert not self.stopped
        self._tokens.append(token)
        self.text = self._tokenizer.decode(self._tokens)
        whole = self.text.rstrip(_REPLACEMENT)  # the end may be a part of a character
        ends = [place for stop in self._stops if (place := self.text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self.text = self.text[: min(ends)]
            return self._send(len(self.text))
        return self._send(len(whole) - self._begun(whole))

    def finish(self) -> str:
        """What was held back, at the end of the tokens; a character that stayed incomplete comes as U+FFFD."""
        return self._send(len(self.text))

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _send(self, end: int) -> str:
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece
