"""A completion request as OpenAI's clients send it: which keys are understood, within which bounds, and how errors are worded.

Everything comes from strangers: sizes are bounded before anything is built from them, and a key that is not understood is
refused, never ignored. Nothing here knows the HTTP server, or more of the model than its limits.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overtok_megatron.data.tokenizers.protocol import Tokenizer
from overtok_megatron.inference.sampling import Sampling

_MAX_STOPS, _MAX_STOP_CHARACTERS, _MAX_TOP_SCORES = 4, 256, 5  # the API's own bounds, except the length of a stop
_DEFAULT_TOKENS = 16  # the API's own


class RequestError(Exception):
    """A request that is not served: HTTP status, a message of one line, and where known the parameter at fault and a code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """As the API words errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for. context and new_tokens: in tokens; choices: texts of one answer."""

    context: int
    new_tokens: int
    choices: int


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The keys of a request. Keys with a single allowed value are served with their default only. top_k is not OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    prompt: Any
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=1000.0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_SCORES)] | None = None
    echo: bool | None = None
    user: str | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Literal[""] | None = None
    presence_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens and as text. by_ids: it was given as token ids, and its text ends before a character that they only
    begin."""

    tokens: list[int]
    text: str
    by_ids: bool


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A request that can be served: its prompts, and how each is continued, n times."""

    request: CompletionRequest
    prompts: list[Prompt]
    max_new_tokens: int
    stops: list[str]
    n: int

    def sampling(self, sample: int, seed: int) -> Sampling:
        """How text number `sample` of a prompt is drawn: the first with the request's seed, or `seed` where it has none; each
        further one with the next seed."""
        request = self.request
        first = seed if request.seed is None else request.seed
        return Sampling(
            max_new_tokens=max(1, self.max_new_tokens),
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=request.top_k or 0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=min(first + sample, 2**63 - 1),
        )


def parse_completion(body: bytes, model: str, tokenizer: Tokenizer, limits: Limits) -> Completion:
    """The request in a body, checked. Raises RequestError: status 400, or 404 for the name of another model."""
    request = _read(body)
    if request.model != model:
        shown = repr(request.model[:80])
        raise RequestError(404, f"model {shown} does not exist; this server has {model!r}", "model", "model_not_found")
    n = request.n or 1
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > _MAX_STOPS or any(not 0 < len(stop) <= _MAX_STOP_CHARACTERS for stop in stops):
        _refuse("stop", f"at most {_MAX_STOPS} strings of 1 to {_MAX_STOP_CHARACTERS} characters")
    if request.stream_options is not None and not request.stream:
        _refuse("stream_options", "only with stream")
    prompts = _parse_prompts(request.prompt, tokenizer, limits, n)
    wanted = _DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    if wanted == 0 and not request.echo:
        _refuse("max_tokens", "0 only with echo")
    if wanted > limits.new_tokens:
        _refuse("max_tokens", f"at most {limits.new_tokens} here")
    longest = max(len(prompt.tokens) for prompt in prompts)
    if longest + wanted > limits.context:
        raise RequestError(
            400,
            f"this model's context is {limits.context} tokens; the prompt has {longest} and max_tokens is {wanted}",
            "prompt" if longest >= limits.context else "max_tokens",
            "context_length_exceeded",
        )
    return Completion(request=request, prompts=prompts, max_new_tokens=wanted, stops=stops, n=n)


def _refuse(param: str, rule: str) -> NoReturn:
    raise RequestError(400, f"{param}: {rule}", param)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _read(body: bytes) -> CompletionRequest:
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of thousands of digits, depths
        reason = "too deep" if isinstance(error, RecursionError) else str(error)[:120]
        raise RequestError(400, f"the body is not JSON in UTF-8: {reason}") from None
    if not isinstance(values, dict):
        raise RequestError(400, "the body must be a JSON object")
    try:
        return CompletionRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = str(first["loc"][0])[:80] if first["loc"] else "a key"  # a key that is not text is not in it
        message = "unknown parameter" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(400, f"{_printable(param)}: {message}", _printable(param)) from None


def _printable(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def _parse_prompts(value: Any, tokenizer: Tokenizer, limits: Limits, n: int) -> list[Prompt]:
    """The prompts of a text, a list of texts, a list of token ids, or a list of such lists."""
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        _refuse("prompt", "a text, texts, token ids, or lists of token ids, and not empty")
    if len(value) * n > limits.choices:
        _refuse(
            "n" if n > 1 else "prompt", f"{len(value)} prompts times n = {n}; at most {limits.choices} texts a request"
        )
    return [_parse_prompt(entry, number, tokenizer) for number, entry in enumerate(value, start=1)]


def _parse_prompt(entry: Any, number: int, tokenizer: Tokenizer) -> Prompt:
    """One prompt, a text or a list of token ids; number: counted from 1, for messages."""
    if isinstance(entry, str):
        try:
            entry.encode("utf-8")  # JSON can spell halves of characters, which no tokenizer takes
        except UnicodeEncodeError:
            _refuse("prompt", f"text {number} holds half a surrogate pair")
        prompt = Prompt(tokenizer.encode(entry), entry, by_ids=False)
    elif isinstance(entry, list) and all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in entry):
        prompt = Prompt(entry, tokenizer.decode(entry).rstrip("\ufffd"), by_ids=True)
    else:
        _refuse("prompt", f"entry {number} is neither a text nor token ids of 0 to {tokenizer.vocab_size - 1}")
    if not prompt.tokens:
        _refuse("prompt", f"entry {number} is empty")
    return prompt
