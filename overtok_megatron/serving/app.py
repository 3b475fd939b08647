"""The HTTP side: routes, bodies of bounded size, answers whole or streamed; work is cancelled when its client leaves."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
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
from overtok_megatron.inference.speculation import Speculation
from overtok_megatron.serving.answers import Answer, Choice, choices_of, joined, model_card
from overtok_megatron.serving.requests import Completion, Limits, RequestError, parse_completion
from overtok_megatron.serving.scheduler import BatchScheduler, BusyError, SequenceRequest, TokenDelta

_SEND_SECONDS = 30.0  # a client that takes no bytes for so long is taken to have left


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """model: the name that requests give. max_body: bytes. seconds: that a request may take, waiting included; body_seconds:
    that its body may take to arrive. hosts: names by which the server may be called (Host header), empty = any.
    """

    model: str
    max_body: int = 1 << 20
    seconds: float = 300.0
    body_seconds: float = 10.0
    hosts: tuple[str, ...] = ()


class Service:
    """The handlers of requests to one model."""

    def __init__(
        self, scheduler: BatchScheduler, trained: TrainedModel, settings: ServerSettings, limits: Limits
    ) -> None:
        self.scheduler, self.trained, self.settings, self.limits = scheduler, trained, settings, limits
        self.created = int(time.time())

    async def health(self, request: Request) -> Response:
        running, waiting = self.scheduler.load
        alive = self.scheduler.alive
        status: dict[str, Any] = {"status": "ok" if alive else "stopped", "running": running, "waiting": waiting}
        if self.scheduler.speculation is not None:
            counts = self.scheduler.speculation.counts
            status["speculation"] = {
                "passes": counts.passes,
                "accepted_per_pass": counts.accepted_per_pass,
                "accepted_shares": counts.shares,
            }
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
        # in a thread: tokenizing may take long, and the event loop serves the others
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
    """Submits the sequences of a completion when it is sent; cancels them when the client leaves or the answer is out."""

    def __init__(self, service: Service, completion: Completion) -> None:
        super().__init__()
        self.service, self.completion = service, completion
        self.answer = Answer(service.settings.model, completion, service.trained.tokenizer)
        self.choices = choices_of(completion)
        self._loop = asyncio.get_running_loop()
        self._delivered: asyncio.Queue[tuple[Choice, TokenDelta]] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        requests = self._sequence_requests()
        try:
            self.service.scheduler.submit(requests)
        except BusyError as error:
            raise RequestError(429, str(error), code="server_busy") from None
        streamed = self.completion.request.stream
        answering = asyncio.create_task(self._send_stream(send) if streamed else self._send_whole(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        except TimeoutError:  # the client takes no bytes
            return
        finally:
            self.service.scheduler.cancel(requests)
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    def _sequence_requests(self) -> list[SequenceRequest]:
        """One for each choice, in their order."""
        completion, request = self.completion, self.completion.request
        deadline = time.monotonic() + self.service.settings.seconds
        seed = secrets.randbits(62)  # for a request that names none
        return [
            SequenceRequest(
                prompt=choice.prompt.tokens,
                max_new_tokens=completion.max_new_tokens,
                sampling=completion.sampling(choice.sample, seed),
                stops=completion.stops,
                top_scores=request.logprobs,
                prompt_scores=bool(request.echo) and request.logprobs is not None,
                deadline=deadline,
                deliver=partial(self._deliver, choice),
                whole_characters=bool(request.echo) and choice.prompt.by_ids,
            )
            for choice in self.choices
        ]

    def _deliver(self, choice: Choice, delta: TokenDelta) -> None:
        """Called on the scheduler's thread."""
        self._loop.call_soon_threadsafe(self._delivered.put_nowait, (choice, delta))

    async def _deltas(self) -> AsyncIterator[tuple[Choice, TokenDelta]]:
        """What is delivered, until every choice has ended."""
        running = len(self.choices)
        while running:
            choice, delta = await self._delivered.get()
            running -= delta.finish is not None
            yield choice, delta

    async def _send_whole(self, send: Send) -> None:
        collected: list[list[TokenDelta]] = [[] for _ in self.choices]
        async for choice, delta in self._deltas():
            collected[choice.index].append(delta)
        texts = [joined(deltas) for deltas in collected]
        for reason in ("timeout", "error"):
            if any(text.finish == reason for text in texts):
                raise _failed(reason)
        parts = [self.answer.part(choice, text) for choice, text in zip(self.choices, texts, strict=True)]
        usage = self.answer.usage(sum(text.tokens for text in texts))
        body = json.dumps(self.answer.body(parts, usage)).encode()
        await _send(send, {"type": "http.response.start", "status": 200, "headers": _headers("application/json", body)})
        await _send(send, {"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send) -> None:
        await _send(send, {"type": "http.response.start", "status": 200, "headers": _headers("text/event-stream")})
        async for event in self._events():
            body = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
            await _send(send, {"type": "http.response.body", "body": body, "more_body": True})
        await _send(send, {"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[dict[str, Any] | str]:
        generated = 0
        async for choice, delta in self._deltas():
            generated += delta.tokens
            if delta.finish in ("timeout", "error"):
                yield _failed(delta.finish).body()
                return
            part = self.answer.part(choice, delta)
            if part["text"] or delta.scores or delta.finish:
                yield self.answer.body([part])
        options = self.completion.request.stream_options
        if options is not None and options.include_usage:
            yield self.answer.body([], self.answer.usage(generated))
        yield "[DONE]"


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
    max_batch: int,
    max_waiting: int,
    prefill_chunk: int,
    speculation: Speculation | None = None,
) -> Starlette:
    """The ASGI application; its lifespan starts and stops the scheduler, whose values the last four are."""
    scheduler = BatchScheduler(
        trained,
        max_batch=max_batch,
        max_waiting=max_waiting,
        prefill_chunk=prefill_chunk,
        speculation=speculation,
    )
    service = Service(scheduler, trained, settings, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with scheduler:
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
