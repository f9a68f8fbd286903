"""Continuous batching: one thread that runs the model, and a queue of requests that join and leave its batch."""

from __future__ import annotations

import atexit
import copy
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import HeadwaterError, Problem
from ..evaluation.forward import max_positions, pad_id, vocabulary_size
from ..evaluation.generate import end_ids
from .batch import Batch
from .routes import Route, Routes, UnavailableError
from .sampling import Sampling, Text, pick

logger = logging.getLogger(__name__)

Finish = Literal["stop", "length", "timeout", "cancelled", "unavailable", "error"]


class BusyError(RuntimeError):
    """The queue is full. `retry_after`: seconds after which it is worth trying again."""

    def __init__(self, retry_after: float):
        super().__init__("the queue is full")
        self.retry_after = retry_after


class ClosedError(RuntimeError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Piece:
    """News about an answer.

    Args:
        text: to append; may be empty.
        token: the token that was drawn, None in a piece that only ends the answer.
        finish: why the answer ended, in its last piece.
        gates: how much each head had in the token, averaged over layers, where that was asked for and is known.
        spelled: the token's text by itself, where gates or log-probabilities were asked for.
        logprob: the token's log-probability as the model has it, before temperature and top_p, where asked for.
        at: how many characters of the answer are before the token.
        error: what went wrong.
    """

    text: str
    token: int | None = None
    finish: Finish | None = None
    gates: list[float] | None = None
    logprob: float | None = None
    spelled: str = ""
    at: int = 0
    error: str = ""


class Ticket:
    """One request on its way."""

    def __init__(
        self,
        prompt: Sequence[int],
        route: Route,
        sampling: Sampling,
        on_piece: Callable[[Piece], None],
        deadline: float | None,
        gates: bool,
        logprobs: bool,
    ):
        self.prompt, self.route, self.sampling = list(prompt), route, sampling
        self.gates, self.logprobs = gates, logprobs
        self._on_piece, self.deadline = on_piece, deadline
        self.cancelled = self.ended = False

    def cancel(self) -> None:
        """Nobody waits for the answer any more; its place in the batch is free with the next token."""
        self.cancelled = True

    def deliver(self, piece: Piece) -> None:
        if self.cancelled or self.ended:
            return
        self.ended = piece.finish is not None
        try:
            self._on_piece(piece)
        except Exception:  # whoever waited has gone in a hurry; the others' answers go on
            logger.exception("an answer's receiver failed")
            self.cancelled = True


class _Row:
    """An answer that is being written."""

    def __init__(self, ticket: Ticket, tokenizer: Any):
        self.ticket, self.text = ticket, Text(tokenizer, ticket.sampling.stop)
        self.generator = ticket.sampling.generator()
        self.began = time.monotonic()
        self.tokens = 0
        self.newest = 0
        self.done = False

    def take(self, token: int, ends: Sequence[int], gates: list[float] | None, logprob: float | None) -> None:
        self.newest, self.tokens = token, self.tokens + 1
        at = self.text.length
        spelled = self.text.spelled(token) if self.ticket.gates or self.ticket.logprobs else ""
        finish: Finish | None = None
        text = ""
        if token in ends:
            finish = "stop"
        else:
            text = self.text.add(token)
            if self.text.stopped:
                finish = "stop"
            elif self.tokens >= self.ticket.sampling.max_tokens:
                finish = "length"
        if finish:
            text += self.text.finish()
            finish = "stop" if self.text.stopped else finish
        piece = Piece(text, token, finish, gates, logprob, spelled, at)
        self.end(piece) if finish else self.ticket.deliver(piece)

    def end(self, piece: Piece) -> None:
        self.done = True
        self.ticket.deliver(piece)


class Engine:
    """Answers requests, many at a time, each as if it were alone.

        engine.generate([[1, 2, 3], [4, 5]], [route_a, route_b], [Sampling(), Sampling(seed=1, temperature=1.0)])

    Args:
        routes: the model, and what requests may choose between.
        tokenizer: the model's.
        max_batch: most requests that are decoded together.
        max_waiting: most requests that wait for a place; more raise `BusyError`.
        max_prefill: most prompt tokens, padding counted, that are read before the next token of the others, unless one
            prompt alone has more.
        max_length: most tokens of a prompt and its answer together; by default as many as the model takes.
        on_step: called after each forward with the number of rows, e.g. to count.

    Raises:
        HeadwaterError: a size is below 1, or the model is one whose answers cannot be written together.
    """

    def __init__(
        self,
        routes: Routes,
        tokenizer: Any,
        *,
        max_batch: int = 16,
        max_waiting: int = 128,
        max_prefill: int = 2048,
        max_length: int | None = None,
        on_step: Callable[[int], None] = lambda rows: None,
    ):
        sizes = {"max_batch": max_batch, "max_waiting": max_waiting, "max_prefill": max_prefill}
        if bad := [Problem(f"{name} must be at least 1, not {n}", name) for name, n in sizes.items() if n < 1]:
            raise HeadwaterError(*bad)
        self.routes, self.max_batch, self.max_waiting, self.max_prefill = routes, max_batch, max_waiting, max_prefill
        self.max_length = min((n for n in (max_length, max_positions(routes.model)) if n is not None), default=None)
        self.vocabulary = vocabulary_size(routes.model)
        self._tokenizer = copy.deepcopy(tokenizer)  # fast tokenizers must not be used by two threads at once
        self._ends = end_ids(routes.model, tokenizer)
        routes.model.eval()
        fill = pad_id(tokenizer)  # some tokenizers have a token for it that their model does not
        self._batch = Batch(routes, fill if fill < self.vocabulary else 0)
        self._rows: list[_Row] = []
        self._waiting: deque[Ticket] = deque()
        self._wake = threading.Condition()
        self._placed: list[Ticket] = []  # those in the batch, and those that are about to be
        self._closing = False
        self._on_step = on_step
        self._seconds_per_answer = 1.0
        self._thread = threading.Thread(target=self._run, name="headwater-engine", daemon=True)
        self._thread.start()
        atexit.register(self._stop)  # a thread that comes out of PyTorch after Python's end aborts the process

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        with self._wake:
            return sum(not ticket.cancelled for ticket in self._waiting)

    @property
    def capacity(self) -> int:
        """Requests that fit at once, answered and waiting."""
        return self.max_batch + self.max_waiting

    def require_room(self, requests: int) -> None:
        """Checks that so many more requests would be taken.

        Raises:
            BusyError: they would not.
        """
        with self._wake:
            waiting = self.waiting
            placed = sum(not (ticket.ended or ticket.cancelled) for ticket in self._placed)
            if waiting + placed + requests > self.capacity:  # whom a place is free for does not wait
                raise BusyError(self._seconds_per_answer * (1 + waiting / self.max_batch))

    def submit(
        self,
        prompt: Sequence[int],
        route: Route,
        sampling: Sampling,
        on_piece: Callable[[Piece], None],
        *,
        timeout: float | None = None,
        gates: bool = False,
        logprobs: bool = False,
    ) -> Ticket:
        """Queues a request and returns at once.

        Args:
            prompt: token ids, at least one.
            on_piece: called from the engine's thread with each piece; the last one has `finish`. Must not block.
            timeout: seconds after which the answer ends as it is, with "timeout".
            gates: tell with each token how much each head had in it.
            logprobs: tell with each token how likely it was.

        Raises:
            BusyError: the queue is full.
            ClosedError: the engine is shutting down.
            HeadwaterError: the prompt is empty, has tokens that the model does not, or is longer with its answer than
                the model can take.
        """
        if not prompt:
            raise HeadwaterError(Problem("the prompt has no tokens, so nothing predicts the answer", "prompt"))
        if strange := [token for token in prompt if not 0 <= token < self.vocabulary]:
            what = f"the prompt has token {strange[0]}, and the model knows 0 to {self.vocabulary - 1}"
            raise HeadwaterError(Problem(what, "prompt", "leave it out"))
        if self.max_length is not None and len(prompt) + sampling.max_tokens > self.max_length:
            what = f"{len(prompt)} tokens of prompt and {sampling.max_tokens} of answer are more than {self.max_length}"
            where = "prompt" if len(prompt) >= self.max_length else "max_tokens"
            raise HeadwaterError(Problem(what, where, "shorten the prompt or the answer"))
        deadline = None if timeout is None else time.monotonic() + timeout
        ticket = Ticket(prompt, route, sampling, on_piece, deadline, gates, logprobs)
        with self._wake:
            if self._closing:
                raise ClosedError("the server is shutting down")
            self.require_room(1)
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    def generate(
        self, prompts: Sequence[Sequence[int]], routes: Sequence[Route], samplings: Sequence[Sampling]
    ) -> list[list[Piece]]:
        """The answers to some prompts, each as its pieces; waits for all of them. Raises as `submit` does."""
        answers: list[list[Piece]] = [[] for _ in prompts]
        left = threading.Semaphore(0)

        def collect(answer: list[Piece], piece: Piece) -> None:
            answer.append(piece)
            if piece.finish:
                left.release()

        for prompt, route, sampling, answer in zip(prompts, routes, samplings, answers, strict=True):
            self.submit(prompt, route, sampling, functools.partial(collect, answer))
        for _ in prompts:
            left.acquire()
        return answers

    def close(self) -> None:
        """Takes no more requests, finishes those that are there, and ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        atexit.unregister(self._stop)

    def _stop(self) -> None:
        """Ends the thread after the forward that is running; nobody waits for the answers any more."""
        with self._wake:
            self._closing = True
            for ticket in [*self._waiting, *self._placed]:
                ticket.cancel()
        self.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._placed = [row.ticket for row in self._rows]
                while not (self._waiting or self._rows or self._closing):
                    self._wake.wait()
                if self._closing and not (self._waiting or self._rows):
                    return
                new = self._admit()
                self._placed += new
            try:
                self._advance(new)
            except Exception as error:  # whatever the model raises must not take the server down with it
                self._fail(error, new)

    def _admit(self) -> list[Ticket]:
        """Takes requests from the queue, first come, first served, as far as there is room."""
        for ticket in filter(_over, list(self._waiting)):
            self._waiting.remove(ticket)
            ticket.deliver(Piece("", finish="timeout"))
        new: list[Ticket] = []
        while self._waiting and len(self._rows) + len(new) < self.max_batch:
            ticket = self._waiting[0]
            longest = max([len(ticket.prompt), *(len(other.prompt) for other in new)])
            if new and longest * (len(new) + 1) > self.max_prefill:
                break
            new.append(self._waiting.popleft())
        return new

    def _advance(self, new: list[Ticket]) -> None:
        """Reads the new prompts, then writes one token of every answer."""
        if new:
            self._join(new)
        self._let_go()
        if self._rows:
            gates = any(row.ticket.gates for row in self._rows)
            self._take(self._rows, self._batch.step([row.newest for row in self._rows], gates=gates))
            self._let_go()

    def _join(self, new: Sequence[Ticket]) -> None:
        gates = any(ticket.gates for ticket in new)
        try:
            joining = [_Row(ticket, self._tokenizer) for ticket in new]
            read = self._batch.read([t.prompt for t in new], [t.route for t in new], gates=gates)
        except Exception as error:  # an adapter that cannot be read, say: nobody else's answer suffers
            if len(new) > 1:
                for ticket in new:
                    self._join([ticket])
            else:
                new[0].deliver(_failed(error))
            return
        self._rows += joining
        self._batch.add(read)
        self._take(joining, read.output)

    def _take(self, rows: Sequence[_Row], output: Any) -> None:
        self._on_step(len(rows))
        logits, gates = output.logits, output.gates
        finite = logits.amax(-1).isfinite()  # -inf only rules a token out
        chosen, failed = logits.argmax(-1), {}
        for i, row in enumerate(rows):
            if row.ticket.sampling.temperature > 0:
                try:
                    chosen[i] = pick(logits[i], row.ticket.sampling, row.generator)
                except Exception as error:  # the others' answers go on
                    failed[i] = error
        tokens, usable = torch.stack([chosen, finite.long()]).tolist()  # at once, as this waits for the device
        for i, row in enumerate(rows):
            if not usable[i]:
                row.end(Piece("", finish="error", error="the model's outputs are not finite numbers (NaN or infinity)"))
                continue
            if i in failed:
                row.end(_failed(failed[i]))
                continue
            ticket, token = row.ticket, tokens[i]
            try:
                logprob = float(logits[i].double().log_softmax(-1)[token]) if ticket.logprobs else None
                row.take(token, self._ends, gates[i] if gates and ticket.gates else None, logprob)
            except Exception as error:
                row.end(_failed(error))

    def _let_go(self) -> None:
        """Drops rows that are done, that nobody waits for any more, or that are out of time."""
        for row in self._rows:
            if not row.done and _over(row.ticket):
                row.end(Piece(row.text.finish(), finish="timeout"))
            if row.done:
                self._seconds_per_answer += 0.1 * (time.monotonic() - row.began - self._seconds_per_answer)
        kept = [i for i, row in enumerate(self._rows) if not row.done and not row.ticket.cancelled]
        self._batch.keep(kept)
        self._rows = [self._rows[i] for i in kept]

    def _fail(self, error: Exception, new: Sequence[Ticket]) -> None:
        """Ends all answers of a batch that could not be run, and those that were about to join it."""
        piece = _failed(error)
        for ticket in [*(row.ticket for row in self._rows), *new]:
            ticket.deliver(piece)
        self._rows = []
        self._batch.clear()


def _over(ticket: Ticket) -> bool:
    return ticket.cancelled or (ticket.deadline is not None and time.monotonic() > ticket.deadline)


def _failed(error: Exception) -> Piece:
    """The last piece of an answer that failed; all of the error goes to the log, as clients read the piece."""
    if isinstance(error, UnavailableError):
        logger.warning("%s: %s", error, error.__cause__)
        return Piece("", finish="unavailable", error=str(error))
    logger.error("answering failed", exc_info=error)
    ours = isinstance(error, HeadwaterError)
    what = str(error) if ours else f"{type(error).__name__} in the server; its log says more"
    return Piece("", finish="error", error=what)
