"""What the scheduler delivers, in the words of OpenAI's completions API. Pure."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.inference.stream import token_text
from overtok_megatron.serving.requests import Completion, Prompt
from overtok_megatron.serving.scheduler import TokenDelta, TokenScore


@dataclass
class Choice:
    """One text of an answer. index: its number in the answer; sample: its number among the texts of its prompt."""

    index: int
    prompt: Prompt
    sample: int
    begun: bool = False  # whether a part of it was made already


def choices_of(completion: Completion) -> list[Choice]:
    """The texts that a request asks for: n for each prompt, one prompt after the other."""
    pairs = [(prompt, sample) for prompt in completion.prompts for sample in range(completion.n)]
    return [Choice(index, prompt, sample) for index, (prompt, sample) in enumerate(pairs)]


class Answer:
    """The answer to one request; all parts of a stream share its id and time."""

    def __init__(self, model: str, completion: Completion, tokenizer: Tokenizer) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._completion = completion
        self._tokenizer = tokenizer

    def body(self, choices: Sequence[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """A whole answer, or one part of a stream."""
        return {**self._head, "choices": list(choices), **({} if usage is None else {"usage": usage})}

    def part(self, choice: Choice, delta: TokenDelta) -> dict[str, Any]:
        """What a delta adds to a choice; the first part begins with the prompt where the request asks for its echo."""
        text = delta.text if choice.begun else self._echoed(choice) + delta.text
        choice.begun = True
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(choice, delta.scores),
            "finish_reason": delta.finish,
        }

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """What the answer cost, in tokens."""
        prompt_tokens = sum(len(prompt.tokens) for prompt in self._completion.prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def _echoed(self, choice: Choice) -> str:
        return choice.prompt.text if self._completion.request.echo else ""

    def _logprobs(self, choice: Choice, scores: list[TokenScore]) -> dict[str, Any] | None:
        """None where the request asks for none. The offsets of a prompt's tokens count from its begin, those of its
        continuation come after it."""
        if self._completion.request.logprobs is None:
            return None
        shift = len(self._echoed(choice))
        with_prompt = shift and scores and scores[0].logprob is None
        count = len(choice.prompt.tokens) if with_prompt else 0
        of_prompt = logprobs(scores[:count], self._tokenizer, 0, begun=False)
        of_text = logprobs(scores[count:], self._tokenizer, shift, begun=bool(choice.prompt.text))
        return {key: of_prompt[key] + of_text[key] for key in of_prompt}


def joined(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """All deltas of a sequence that has ended as one."""
    return TokenDelta(
        "".join(delta.text for delta in deltas),
        [score for delta in deltas for score in delta.scores],
        sum(delta.tokens for delta in deltas),
        deltas[-1].finish,
    )


def logprobs(scores: Sequence[TokenScore], tokenizer: Tokenizer, shift: int, *, begun: bool) -> dict[str, Any]:
    """shift: characters of the answer before the text that the scores' offsets count from. begun: whether any text stands
    before it, in the answer or not: many tokenizers spell a token without its space at the begin of a text."""

    def text(token: int, score: TokenScore) -> str:
        return _token_text(token, tokenizer, begins=not (begun or score.offset))

    return {
        "tokens": [text(score.token, score) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [
            None if score.logprob is None else {text(token, score): value for token, value in score.top}
            for score in scores
        ],
        "text_offset": [score.offset + shift for score in scores],
    }


def _token_text(token: int, tokenizer: Tokenizer, *, begins: bool) -> str:
    """A token as text; by its number where it is not a text of its own (a part of a character, the end of a document)."""
    text = token_text(tokenizer, token, begins=begins)
    return text if text and "\ufffd" not in text else f"token_id:{token}"


def model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "overtok_megatron"}
