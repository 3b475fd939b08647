"""What the engine delivers, in the words of OpenAI's completions API. Pure."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.inference.stream import token_text
from overtok_megatron.serving.scheduler import TokenScore


class Answer:
    """Names of one answer: all parts of a stream share its id and time."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def body(self, choices: Sequence[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        """A whole answer, or one part of a stream."""
        return {**self._head, "choices": list(choices), **({} if usage is None else {"usage": usage})}


def choice(index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def logprobs(scores: Sequence[TokenScore], tokenizer: Tokenizer, shift: int, *, begun: bool) -> dict[str, Any]:
    """shift: characters of the answer before the text that the scores' offsets count from. begun: whether text is before it,
    in the answer or not: many tokenizers spell a token without its space at the begin of a text."""

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
    """A token as text; where it is no text of its own (a part of a character, the end of a document) by its number."""
    text = token_text(tokenizer, token, begins=begins)
    return text if text and "\ufffd" not in text else f"token_id:{token}"


def model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "overtok_megatron"}
