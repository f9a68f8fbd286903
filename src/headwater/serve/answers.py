"""The answers to one request, from the engine's thread to JSON or to the events of a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse, Response

from .engine import Piece, Ticket
from .protocol import Shape, logprobs_of, usage
from .refusals import Refused
from .routes import Route
from .sampling import Sampling

if TYPE_CHECKING:
    from .app import Service

_STATUS_OF_FINISH = {"timeout": 504, "unavailable": 503, "error": 500}


class Answers:
    """The answers to one request, as their pieces come in from the engine's thread.

    Args:
        name: of what answers, as it was asked for.
        began: when the request came, by `time.monotonic`.
    """

    def __init__(self, service: Service, name: str, began: float, *, gates: bool, logprobs: bool):
        self.service, self.name, self._began = service, name, began
        self._gates, self._logprobs = gates, logprobs
        self.tickets: list[Ticket] = []
        self.routes: list[Route] = []
        self.tokens = 0
        self._open = 0
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def ask(self, prompt: Sequence[int], route: Route, sampling: Sampling) -> None:
        index = len(self.tickets)

        def on_piece(piece: Piece) -> None:
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))
            except RuntimeError:  # the loop was closed a moment ago, which a second signal does: nobody waits
                self.cancel()

        submit, timeout = self.service.engine.submit, self._began + self.service.limits.timeout - time.monotonic()
        self.tickets.append(
            submit(prompt, route, sampling, on_piece, timeout=timeout, gates=self._gates, logprobs=self._logprobs)
        )
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
        return {"token": piece.spelled, "gates": [round(gate, 4) for gate in piece.gates or ()]}

    def logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """How likely the tokens of these pieces were, where that was asked for."""
        known = [(p.spelled, p.logprob, p.at) for p in pieces if p.logprob is not None]
        return logprobs_of(known) if known else None


async def whole(answers: Answers, shape: Shape, read: int) -> Response:
    texts = [""] * len(answers.tickets)
    finishes: list[str | None] = [None] * len(texts)
    got: list[list[Piece]] = [[] for _ in texts]
    async with aclosing(answers.pieces()) as pieces:
        async for index, piece in pieces:
            if piece.finish in _STATUS_OF_FINISH:
                raise _failure(piece)
            texts[index] += piece.text
            finishes[index] = piece.finish
            got[index].append(piece)
    choices = []
    for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
        about = answers.about(index)
        if answers.tickets[index].gates:
            about["tokens"] = list(map(answers.token, got[index]))
        choices.append({**shape.whole(index, text, finish, answers.logprobs(got[index])), "headwater": about})
    return JSONResponse(shape.body(choices, usage=usage(read, answers.tokens)))


async def events(answers: Answers, shape: Shape, read: int | None) -> AsyncIterator[str]:
    begun: set[int] = set()
    async with aclosing(answers.pieces()) as pieces:
        async for index, piece in pieces:
            if piece.finish in _STATUS_OF_FINISH:
                yield _event(_failure(piece).body)
                return
            logprobs = answers.logprobs([piece])
            choice = shape.part(index, piece.text, piece.finish, logprobs, first=index not in begun)
            about = {} if index in begun else answers.about(index)
            if answers.tickets[index].gates:
                about |= answers.token(piece)
            begun.add(index)
            if piece.text or piece.finish or about or logprobs:
                yield _event(shape.body([{**choice, **({"headwater": about} if about else {})}], chunk=True))
    if read is not None:
        yield _event(shape.body([], chunk=True, usage=usage(read, answers.tokens)))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _failure(piece: Piece) -> Refused:
    if piece.finish == "timeout":
        return late()
    return Refused(_STATUS_OF_FINISH[piece.finish or ""], piece.error, "server_error", code=piece.finish)


def late() -> Refused:
    """What is said where a request is out of time."""
    return Refused(504, "the answer took too long", "server_error", code="timeout")
