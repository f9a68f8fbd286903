"""The HTTP side: OpenAI's paths on FastAPI, over one engine."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..data.encode import DataSpec, encode_prompt
from ..data.rows import Row
from ..errors import HeadwaterError
from .engine import BusyError, ClosedError, Engine, Piece, Ticket
from .guard import Guard
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest, Shape, error_body, usage
from .routes import Route
from .sampling import Sampling

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_STATUS_OF_FINISH = {"timeout": 504, "error": 500}


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Args:
        max_tokens: most tokens of an answer.
        default_tokens: as many where a request does not say.
        max_body: most bytes of a request.
        max_answers: most answers to one request: prompts times `n`.
        timeout: seconds that a request may take altogether.
    """

    max_tokens: int = 1024
    default_tokens: int = 256
    max_body: int = 1 << 20
    max_answers: int = 16
    timeout: float = 120.0


class Refused(Exception):  # noqa: N818, it is an answer
    """An answer that is an error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **more: Any):
        super().__init__(message)
        self.status, self.retry_after = status, more.pop("retry_after", None)
        self.body = error_body(message, kind, **more)

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return JSONResponse(self.body, self.status, headers)


class Service:
    """From requests to the engine and back.

    Args:
        engine: started; closed when the application shuts down.
        tokenizer: the model's; used from one thread of the service's own.
        data_spec: how prompts become tokens, as in training.
    """

    def __init__(self, engine: Engine, tokenizer: Any, data_spec: DataSpec, limits: Limits, metrics: Metrics):
        self.engine, self.tokenizer, self.limits, self.metrics = engine, tokenizer, limits, metrics
        self.data_spec = data_spec
        self.started = int(time.time())
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="headwater-reader")

    async def _apart(self, function: Callable[..., _T], *args: Any) -> _T:
        """Runs what takes long beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, function, *args)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        messages = tuple(message.plain() for message in body.messages)
        row = Row(prompt=messages[-1]["content"], completion="", messages=messages)
        never = self.data_spec.chat_template == "never"
        spec = self.data_spec.model_copy(update={"chat_template": "auto"}) if never else self.data_spec
        prompt = await self._apart(encode_prompt, row, self.tokenizer, spec)
        limit = body.max_completion_tokens or body.max_tokens
        return await self._answer(body, request, [(prompt, row.prompt)], limit, chat=True)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        prompts: list[tuple[list[int], str]] = []
        vocabulary = len(self.tokenizer)
        for prompt in body.prompts:
            if isinstance(prompt, str):
                row = Row(prompt=prompt, completion="")
                prompts.append((await self._apart(encode_prompt, row, self.tokenizer, self.data_spec), prompt))
            elif all(0 <= token < vocabulary for token in prompt):
                prompts.append((prompt, await self._apart(self.tokenizer.decode, prompt)))
            else:
                raise Refused(400, f"token ids go from 0 to {vocabulary - 1}", param="prompt")
        return await self._answer(body, request, prompts, body.max_tokens, chat=False)

    async def _answer(
        self,
        body: ChatRequest | CompletionRequest,
        request: Request,
        prompts: Sequence[tuple[list[int], str]],
        max_tokens: int | None,
        *,
        chat: bool,
    ) -> Response:
        limits = self.limits
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise Refused(400, f"an answer has at most {limits.max_tokens} tokens here", param="max_tokens")
        if not 1 <= len(prompts) * body.n <= limits.max_answers:
            raise Refused(400, f"a request has 1 to {limits.max_answers} answers: prompts times n", param="n")
        name = body.model or self.engine.routes.names[0]
        try:
            routes = [await self._apart(self.engine.routes.choose, name, text) for _, text in prompts]
        except HeadwaterError as error:
            if name in self.engine.routes.names:
                raise
            raise Refused(404, _said(error), param="model", code="model_not_found") from error
        answers = Answers(self, name)
        try:
            for index in range(len(prompts) * body.n):
                prompt, route = prompts[index // body.n][0], routes[index // body.n]
                answers.ask(prompt, route, self._sampling(body, prompt, max_tokens, index), gates=body.headwater.gates)
        except BaseException:
            answers.cancel()
            raise
        read = sum(len(prompt) for prompt, _ in prompts)
        self.metrics.tokens.labels("prompt").inc(read)
        shape = Shape(chat=chat, model=name)
        if body.stream:
            events = _events(answers, shape, read if body.stream_options.include_usage else None)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        return await _unless_gone(_whole(answers, shape, read), request, answers)

    def _sampling(self, body: Any, prompt: Sequence[int], max_tokens: int | None, index: int) -> Sampling:
        if max_tokens is None:
            room = self.limits.max_tokens
            if self.engine.max_length is not None:
                room = max(1, self.engine.max_length - len(prompt))
            max_tokens = min(self.limits.default_tokens, self.limits.max_tokens, room)
        seed = None if body.seed is None else (body.seed + index) % 2**63
        return Sampling(max_tokens, body.temperature, body.top_p, body.stops, seed)


class Answers:
    """The answers to one request, as their pieces come in from the engine's thread."""

    def __init__(self, service: Service, name: str):
        self.service, self.name = service, name
        self.tickets: list[Ticket] = []
        self.routes: list[Route] = []
        self.tokens = 0
        self._open = 0
        self._began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def ask(self, prompt: Sequence[int], route: Route, sampling: Sampling, *, gates: bool) -> None:
        index = len(self.tickets)

        def on_piece(piece: Piece) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        timeout = self.service.limits.timeout
        engine = self.service.engine
        self.tickets.append(engine.submit(prompt, route, sampling, on_piece, timeout=timeout, gates=gates))
        self.routes.append(route)
        self._open += 1

    def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Answer's number and piece, until all answers have ended; whoever stops earlier cancels them."""
        metrics, first = self.service.metrics, True
        try:
            while self._open:
                index, piece = await self._queue.get()
                if piece.token is not None:
                    self.tokens += 1
                    metrics.tokens.labels("completion").inc()
                    if first:
                        metrics.first.observe(time.monotonic() - self._began)
                        first = False
                if piece.finish:
                    self._open -= 1
                    metrics.answers.labels(self.name, piece.finish).inc()
                    metrics.seconds.observe(time.monotonic() - self._began)
                yield index, piece
        finally:
            if self._open:
                metrics.answers.labels(self.name, "cancelled").inc(self._open)
            self.cancel()

    def about(self, index: int) -> dict[str, Any]:
        """Which of a pool's adapters answer, and how much each counts."""
        return {"adapters": dict(self.routes[index].mixture)}

    def token(self, piece: Piece) -> dict[str, Any]:
        """A token with its gates, as `headwater` in an answer."""
        text = "" if piece.token is None else self.service.tokenizer.decode([piece.token])
        return {"token": text, "gates": [round(gate, 4) for gate in piece.gates or ()]}


async def _whole(answers: Answers, shape: Shape, read: int) -> Response:
    texts = [""] * len(answers.tickets)
    finishes: list[str | None] = [None] * len(texts)
    tokens: list[list[dict[str, Any]]] = [[] for _ in texts]
    async with aclosing(answers.pieces()) as pieces:
        async for index, piece in pieces:
            if piece.finish in _STATUS_OF_FINISH:
                raise _failure(piece)
            texts[index] += piece.text
            finishes[index] = piece.finish
            if answers.tickets[index].gates:
                tokens[index].append(answers.token(piece))
    choices = []
    for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
        about = answers.about(index) | ({"tokens": tokens[index]} if tokens[index] else {})
        choices.append({**shape.whole(index, text, finish), "headwater": about})
    return JSONResponse(shape.body(choices, usage=usage(read, answers.tokens)))


async def _events(answers: Answers, shape: Shape, read: int | None) -> AsyncIterator[str]:
    begun: set[int] = set()
    async with aclosing(answers.pieces()) as pieces:
        async for index, piece in pieces:
            if piece.finish in _STATUS_OF_FINISH:
                yield _event(_failure(piece).body)
                return
            choice = shape.part(index, piece.text, piece.finish, first=index not in begun)
            about = {} if index in begun else answers.about(index)
            if answers.tickets[index].gates:
                about |= answers.token(piece)
            begun.add(index)
            if piece.text or piece.finish or about:
                yield _event(shape.body([{**choice, **({"headwater": about} if about else {})}], chunk=True))
    if read is not None:
        yield _event(shape.body([], chunk=True, usage=usage(read, answers.tokens)))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _failure(piece: Piece) -> Refused:
    what = piece.error or "the answer took too long"
    return Refused(_STATUS_OF_FINISH[piece.finish or ""], what, "server_error", code=piece.finish)


async def _unless_gone(answer: Awaitable[Response], request: Request, answers: Answers) -> Response:
    """The answer, unless the client leaves first."""
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=499)
    finally:
        answers.cancel()
        for task in (working, leaving):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _said(error: HeadwaterError) -> str:
    return "; ".join(": ".join(filter(None, (p.what, p.fix))) for p in error.problems)


def make_app(service: Service, *, api_key: str | None = None, loopback: bool = True) -> Any:
    """The ASGI application.

    Args:
        api_key: required of everybody, if there is one.
        loopback: it is bound to loopback, so nobody has a reason to call it by another name.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.engine.close)

    app = FastAPI(title="headwater", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    page = files("headwater.serve").joinpath("page.html").read_text(encoding="utf-8")
    policy = "default-src 'self' 'unsafe-inline'; img-src data:; frame-ancestors 'none'"

    @app.get("/", response_class=HTMLResponse)
    async def _page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def _health() -> dict[str, Any]:
        return {"status": "ok", "running": service.engine.running, "waiting": service.engine.waiting}

    @app.get("/metrics")
    async def _metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started, "owned_by": "headwater"}

    @app.get("/v1/models")
    async def _models() -> dict[str, Any]:
        return {"object": "list", "data": list(map(card, service.engine.routes.names))}

    @app.get("/v1/models/{name}")
    async def _model(name: str) -> dict[str, Any]:
        if name not in service.engine.routes.names:
            raise Refused(404, f"the model `{name}` does not exist here", param="model", code="model_not_found")
        return card(name)

    @app.post("/v1/chat/completions")
    async def _chat(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @app.post("/v1/completions")
    async def _complete(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)

    def refuse(refused: Refused) -> JSONResponse:
        service.metrics.refused.labels(str(refused.status)).inc()
        return refused.response()

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        return refuse(Refused(500, f"{type(error).__name__} in the server; its log says more", "server_error"))

    def explained(error: Exception) -> Refused:
        if isinstance(error, Refused):
            return error
        if isinstance(error, BusyError):
            what = "the server has as many requests as it can take; try again later"
            return Refused(429, what, "rate_limit_error", code="queue_full", retry_after=error.retry_after)
        if isinstance(error, ClosedError):
            return Refused(503, str(error), "server_error", retry_after=5)
        if isinstance(error, HeadwaterError):
            return Refused(400, _said(error), param=error.problems[0].where or None)
        if isinstance(error, RequestValidationError):
            texts = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}".lstrip(": ") for e in error.errors()]
            where = error.errors()[0]["loc"][1:2]
            return Refused(400, "; ".join(dict.fromkeys(texts)), param=str(where[0]) if where else None)
        assert isinstance(error, HTTPException)
        return Refused(error.status_code, str(error.detail))

    async def _expected(request: Request, error: Exception) -> JSONResponse:
        return refuse(explained(error))

    for kind in (Refused, BusyError, ClosedError, HeadwaterError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _expected)
    return Guard(app, api_key=api_key, max_body=service.limits.max_body, loopback=loopback)
