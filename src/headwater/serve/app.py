"""The HTTP side: OpenAI's paths on FastAPI, over one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..data.conversation import for_conversation
from ..data.encode import DataSpec, encode_prompt
from ..data.rows import Row
from ..errors import HeadwaterError
from .answers import Answers, events, late, whole
from .engine import BusyError, ClosedError, Engine
from .guard import Guard
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest, Shape
from .refusals import Refused, mistake, said
from .routes import Route, unknown
from .sampling import Sampling

_Prompt = Row | str | list[int]
"""A conversation, a text or token ids."""


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Args:
        max_tokens: most tokens of an answer.
        default_tokens: as many where a request does not say.
        max_body: most bytes of a request.
        max_answers: most answers to one request: prompts times `n`.
        timeout: seconds that a request may take altogether, once its body is there.
    """

    max_tokens: int = 1024
    default_tokens: int = 256
    max_body: int = 1 << 20
    max_answers: int = 16
    timeout: float = 120.0


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
        self._vocabulary = min(len(tokenizer), engine.vocabulary)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="headwater-reader")
        self._reading = 0  # answers whose prompts are being read: they hold places, as those in the queue do

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        messages = tuple(message.plain() for message in body.messages)
        row = Row(prompt=messages[-1]["content"], completion="", messages=messages)
        return await _unless_gone(self._answer(body, [row]), request)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        return await _unless_gone(self._answer(body, body.prompts), request)

    def _check(self, body: ChatRequest | CompletionRequest, name: str, prompts: Sequence[_Prompt]) -> None:
        """Refuses what can be refused without reading the prompts."""
        if body.limit is not None and body.limit > self.limits.max_tokens:
            where = _places(body).get("max_tokens", "max_tokens")
            raise Refused(400, f"an answer has at most {self.limits.max_tokens} tokens here", param=where)
        most = min(self.limits.max_answers, self.engine.capacity)  # more would never fit, however often they came back
        if len(prompts) * body.n > most:
            where = "n" if body.n > 1 else "prompt"
            raise Refused(400, f"a request has at most {most} answers here: prompts times n", param=where)
        names = self.engine.routes.names
        if name not in names:
            raise Refused(404, said(unknown(name, names)), param="model", code="model_not_found")
        for prompt in prompts:
            if isinstance(prompt, list) and not all(0 <= token < self._vocabulary for token in prompt):
                raise Refused(400, f"token ids go from 0 to {self._vocabulary - 1}", param="prompt")

    def _read(self, prompts: Sequence[_Prompt], name: str) -> list[tuple[list[int], Route]]:
        """Each prompt's tokens, and what answers it."""
        read = []
        for prompt in prompts:
            if isinstance(prompt, list):
                ids, text = prompt, self.tokenizer.decode(prompt)
            elif isinstance(prompt, str):
                ids, text = encode_prompt(Row(prompt=prompt, completion=""), self.tokenizer, self.data_spec), prompt
            else:
                ids, text = encode_prompt(prompt, self.tokenizer, for_conversation(self.data_spec)), prompt.prompt
            read.append((ids, self.engine.routes.choose(name, text)))
        return read

    async def _answer(self, body: ChatRequest | CompletionRequest, prompts: Sequence[_Prompt]) -> Response:
        began = time.monotonic()
        name = body.model or self.engine.routes.names[0]
        self._check(body, name, prompts)
        count = len(prompts) * body.n
        self.engine.require_room(self._reading + count)
        self._reading += count
        reading = asyncio.get_running_loop().run_in_executor(self._reader, self._read, prompts, name)
        try:
            await asyncio.wait({reading}, timeout=self.limits.timeout)
            if not reading.done():
                raise late()
            read = reading.result()
        finally:
            reading.cancel()
            self._reading -= count
        logprobs = isinstance(body, CompletionRequest) and body.asks_logprobs
        answers = Answers(self, name, began, gates=body.headwater.gates, logprobs=logprobs)
        try:
            for index in range(count):
                prompt, route = read[index // body.n]
                answers.ask(prompt, route, self._sampling(body, prompt, index))
        except BaseException as error:
            answers.cancel()
            if isinstance(error, HeadwaterError):
                where = error.problems[0].where
                raise Refused(400, said(error), param=_places(body).get(where, where)) from error
            raise
        tokens = sum(len(prompt) for prompt, _ in read)
        self.metrics.tokens.labels("prompt").inc(tokens)
        shape = Shape(chat=isinstance(body, ChatRequest), model=name)
        if body.stream:
            stream = events(answers, shape, tokens if body.stream_options.include_usage else None)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        try:
            return await whole(answers, shape, tokens)
        finally:
            answers.cancel()

    def _sampling(self, body: ChatRequest | CompletionRequest, prompt: Sequence[int], index: int) -> Sampling:
        max_tokens = body.limit
        if max_tokens is None:
            room = self.limits.max_tokens
            if self.engine.max_length is not None:
                room = max(1, self.engine.max_length - len(prompt))
            max_tokens = min(self.limits.default_tokens, self.limits.max_tokens, room)
        seed = None if body.seed is None else (body.seed + index) % 2**63
        return Sampling(max_tokens, body.temperature, body.top_p, body.stops, seed)


def _places(body: ChatRequest | CompletionRequest) -> dict[str, str]:
    """What the engine calls things -> what the request does."""
    places = {"prompt": "messages"} if isinstance(body, ChatRequest) else {}
    if isinstance(body, ChatRequest) and body.max_completion_tokens:
        places["max_tokens"] = "max_completion_tokens"
    return places


async def _unless_gone(answer: Awaitable[Response], request: Request) -> Response:
    """The answer, unless the client leaves first."""
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)
    finally:
        for task in (working, leaving):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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

    def count(status: int) -> None:
        service.metrics.refused.labels(str(status)).inc()

    def refuse(refused: Refused) -> JSONResponse:
        count(refused.status)
        return refused.response()

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        return refuse(Refused(500, f"{type(error).__name__} in the server; its log says more", "server_error"))

    def explained(error: Exception, content_type: str) -> Refused:
        if isinstance(error, Refused):
            return error
        if isinstance(error, BusyError):
            what = "the server has as many requests as it can take; try again later"
            return Refused(429, what, "rate_limit_error", code="queue_full", retry_after=error.retry_after)
        if isinstance(error, ClosedError):
            return Refused(503, str(error), "server_error", retry_after=5)
        if isinstance(error, HeadwaterError):
            return Refused(400, said(error), param=error.problems[0].where or None)
        if isinstance(error, RequestValidationError):
            what, where = mistake(error, content_type)
            return Refused(400, what, param=where)
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # FastAPI raises it, and does not say why
            return Refused(400, "the body is not JSON in UTF-8, or is nested too deeply")
        return Refused(error.status_code, str(error.detail))

    async def _expected(request: Request, error: Exception) -> JSONResponse:
        return refuse(explained(error, request.headers.get("content-type", "")))

    for kind in (Refused, BusyError, ClosedError, HeadwaterError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _expected)
    return Guard(app, api_key=api_key, max_body=service.limits.max_body, loopback=loopback, on_refused=count)
