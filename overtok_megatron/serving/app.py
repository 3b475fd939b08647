"""The HTTP side: routes, bodies within bounds, answers whole or streamed, and work that ends when nobody waits for it."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from overtok_megatron.inference.loading import TrainedModel
from overtok_megatron.serving.answers import Answer, choice, logprobs, model_card, usage
from overtok_megatron.serving.requests import Completion, Limits, RequestError, parse_completion
from overtok_megatron.serving.scheduler import BatchScheduler, BusyError, SequenceRequest, TokenDelta, TokenScore

_SEND_SECONDS = 30.0  # a client that takes no bytes for so long is gone


@dataclass(frozen=True)
class ServerSettings:
    """model: the name that requests give. seconds: of one request, waiting included; body_seconds: of its body's arrival.

    hosts: names by which the server may be called (Host header), empty = any.
    """

    model: str
    max_body: int = 1 << 20
    seconds: float = 300.0
    body_seconds: float = 10.0
    hosts: tuple[str, ...] = ()


class Service:
    """The handlers of one engine."""

    def __init__(self, engine: BatchScheduler, trained: TrainedModel, settings: ServerSettings, limits: Limits) -> None:
        self.engine, self.trained, self.settings, self.limits = engine, trained, settings, limits
        self.created = int(time.time())

    async def health(self, request: Request) -> Response:
        running, waiting = self.engine.load
        alive = self.engine.alive
        status = {"status": "ok" if alive else "stopped", "running": running, "waiting": waiting}
        return JSONResponse(status, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(self.settings.model, self.created)]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.settings.model:
            raise RequestError(404, "no such model", "model", "model_not_found")
        return JSONResponse(model_card(self.settings.model, self.created))

    async def completions(self, request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "Content-Type must be application/json")  # also what keeps other sites' forms out
        body = await self._body(request)
        # tokenizing may take long: not on the loop that serves the others
        completion = await asyncio.to_thread(
            parse_completion, body, self.settings.model, self.trained.tokenizer, self.limits
        )
        return CompletionResponse(self, completion)

    async def _body(self, request: Request) -> bytes:
        limit = self.settings.max_body
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise RequestError(413, f"the body has more than {limit} bytes")
                    parts.append(part)
        except TimeoutError:
            raise RequestError(408, f"the body took longer than {self.settings.body_seconds:g} s") from None
        return b"".join(parts)


class CompletionResponse(Response):
    """Submits the jobs of a completion when it is sent; cancels them when the client leaves or the answer is out."""

    def __init__(self, service: Service, completion: Completion) -> None:
        super().__init__()
        self.service, self.completion = service, completion
        self.answer = Answer(service.settings.model)
        self.pieces: asyncio.Queue[tuple[int, TokenDelta]] = asyncio.Queue()
        self.prompt_tokens = sum(map(len, completion.prompts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        jobs = self._jobs(asyncio.get_running_loop())
        try:
            self.service.engine.submit(jobs)
        except BusyError as error:
            raise RequestError(429, str(error), code="server_busy") from None
        work = asyncio.create_task(self._answer(len(jobs), send))
        left = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except TimeoutError:  # the client takes no bytes
            return
        finally:
            self.service.engine.cancel(jobs)
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    def _jobs(self, loop: asyncio.AbstractEventLoop) -> list[SequenceRequest]:
        completion, request = self.completion, self.completion.request
        deadline = time.monotonic() + self.service.settings.seconds
        seed = secrets.randbits(62)  # of a request that names none

        def job(index: int) -> SequenceRequest:
            def deliver(piece: TokenDelta) -> None:  # on the engine's thread
                loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

            return SequenceRequest(
                prompt=completion.prompts[index // completion.n],
                max_new_tokens=completion.max_new_tokens,
                sampling=completion.sampling(index % completion.n, seed),
                stops=completion.stops,
                top_scores=request.logprobs,
                prompt_scores=bool(request.echo) and request.logprobs is not None,
                deadline=deadline,
                deliver=deliver,
                whole_characters=bool(request.echo) and completion.by_ids[index // completion.n],
            )

        return [job(index) for index in range(len(completion.prompts) * completion.n)]

    async def _answer(self, count: int, send: Send) -> None:
        if self.completion.request.stream:
            await self._stream(count, send)
        else:
            await self._whole(count, send)

    async def _whole(self, count: int, send: Send) -> None:
        parts: list[list[TokenDelta]] = [[] for _ in range(count)]
        left = count
        while left:
            index, piece = await self.pieces.get()
            parts[index].append(piece)
            left -= piece.finish is not None
        reasons = [pieces[-1].finish for pieces in parts]
        for reason in ("timeout", "error"):
            if reason in reasons:
                raise _failed(reason)
        choices = [
            choice(
                index,
                self._prompt_text(index) + "".join(piece.text for piece in pieces),
                self._scores(index, [score for piece in pieces for score in piece.scores]),
                reasons[index],
            )
            for index, pieces in enumerate(parts)
        ]
        generated = sum(piece.tokens for pieces in parts for piece in pieces)
        body = json.dumps(self.answer.body(choices, usage(self.prompt_tokens, generated))).encode()
        await _send(send, {"type": "http.response.start", "status": 200, "headers": _headers("application/json", body)})
        await _send(send, {"type": "http.response.body", "body": body})

    async def _stream(self, count: int, send: Send) -> None:
        await _send(send, {"type": "http.response.start", "status": 200, "headers": _headers("text/event-stream")})
        async for event in self._events(count):
            body = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
            await _send(send, {"type": "http.response.body", "body": body, "more_body": True})
        await _send(send, {"type": "http.response.body", "body": b""})

    async def _events(self, count: int) -> AsyncIterator[dict[str, Any] | str]:
        options = self.completion.request.stream_options
        left, generated = count, 0
        begun = [False] * count
        while left:
            index, piece = await self.pieces.get()
            left -= piece.finish is not None
            generated += piece.tokens
            if piece.finish in ("timeout", "error"):
                yield _failed(piece.finish).body()
                return
            text = piece.text if begun[index] else self._prompt_text(index) + piece.text
            if text or piece.scores or piece.finish:
                begun[index] = True
                yield self.answer.body([choice(index, text, self._scores(index, piece.scores), piece.finish)])
        if options is not None and options.include_usage:
            yield self.answer.body([], usage(self.prompt_tokens, generated))
        yield "[DONE]"

    def _prompt_text(self, index: int) -> str:
        return self.completion.texts[index // self.completion.n] if self.completion.request.echo else ""

    def _scores(self, index: int, scores: list[TokenScore]) -> dict[str, Any] | None:
        """Offsets of a prompt's tokens are within it already, those of its continuation come behind it."""
        if self.completion.request.logprobs is None:
            return None
        tokenizer = self.service.trained.tokenizer
        shift = len(self._prompt_text(index))
        size = len(self.completion.prompts[index // self.completion.n])
        begun = bool(self.completion.texts[index // self.completion.n])
        of_prompt = size if shift and scores and scores[0].logprob is None else 0
        both = [
            logprobs(scores[:of_prompt], tokenizer, 0, begun=False),
            logprobs(scores[of_prompt:], tokenizer, shift, begun=begun),
        ]
        return {key: both[0][key] + both[1][key] for key in both[0]}


def _failed(reason: str) -> RequestError:
    if reason == "timeout":
        return RequestError(504, "the request took longer than this server allows", code="timeout")
    return RequestError(500, "the model failed on this request", code="internal_error")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, message: dict[str, Any]) -> None:
    async with asyncio.timeout(_SEND_SECONDS):
        await send(message)


def _headers(content_type: str, body: bytes | None = None) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")]
    return headers if body is None else [*headers, (b"content-length", str(len(body)).encode())]


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    if error.status in (408, 413, 415):
        headers["Connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = RequestError(error.status_code, f"{request.method} here: {error.detail}").body()
    return JSONResponse(body, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


def build_app(
    trained: TrainedModel,
    settings: ServerSettings,
    limits: Limits,
    *,
    places: int,
    max_waiting: int,
    prefill_chunk: int,
) -> Starlette:
    """The ASGI application; its lifespan starts and stops the engine."""
    engine = BatchScheduler(trained, places=places, max_waiting=max_waiting, prefill_chunk=prefill_chunk)
    service = Service(engine, trained, settings, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with engine:
            yield

    return Starlette(
        routes=[
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/health", service.health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))] if settings.hosts else [],
        exception_handlers={RequestError: _request_error, HTTPException: _http_error, ClientDisconnect: _gone},
        lifespan=lifespan,
    )
