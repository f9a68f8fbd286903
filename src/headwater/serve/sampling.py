"""From logits to tokens, and from tokens to text that can be sent already."""

from __future__ import annotations

import functools
import math
import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..evaluation.generate import decode

_UNFINISHED = "\ufffd"  # what bytes that are not yet a whole character decode to


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn.

    Args:
        max_tokens: most tokens of the answer, > 0.
        temperature: 0 takes the likeliest token each time.
        top_p: only the likeliest tokens that make up this probability are drawn from; in (0, 1].
        stop: texts that end the answer; they are not part of it.
        seed: of the draws; None takes a new one. An answer does not depend on what else is in its batch.

    Raises:
        HeadwaterError: a number is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        sound = {
            "max_tokens": self.max_tokens > 0,
            "temperature": 0 <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
        }
        if bad := [Problem(f"{getattr(self, name)} is out of range", name) for name, ok in sound.items() if not ok]:
            raise HeadwaterError(*bad)

    def generator(self) -> torch.Generator:
        """A generator of this answer's own."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return torch.Generator().manual_seed(seed)


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draws a token from logits `(vocabulary,)`, the largest of which has to be finite.

    One number is drawn, on the CPU, where `generator` is; the rest, in float64, stays on the logits' device, and so
    does the result, int64 `()`: nothing is waited for.
    """
    if sampling.temperature == 0:
        return logits.argmax()
    z = logits.double()
    p = torch.softmax((z - z.max()) / sampling.temperature, dim=-1)  # below 0 first: tiny temperatures give no infinity
    order = None
    if sampling.top_p < 1:
        p, order = p.sort(descending=True, stable=True)
        p = p.masked_fill(p.cumsum(0) - p >= sampling.top_p, 0)  # those before make it up
    # Tokens side by side, each as wide as it is likely: the one that a random place on the whole lies in.
    ends = p.cumsum(0)
    u = torch.rand((), dtype=p.dtype, generator=generator).to(p.device, non_blocking=True)
    place = torch.searchsorted(ends, u * ends[-1], right=True)  # right: past those that are as wide as nothing
    return place if order is None else order.take(place)


class Text:
    """The growing text of one answer.

    Text is given out as soon as it is sure: not while a character lacks bytes, and not while what is there could be
    the beginning of a stop text.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self._tokenizer, self._stop = tokenizer, tuple(filter(None, stop))
        self._tokens: list[int] = []
        # Tokens before `_start` are text already; those up to `_read` are decoded again with new ones, because some
        # tokenizers write a word differently where nothing stands before it.
        self._start = self._read = 0
        self._held = ""
        self.length = 0
        """Characters so far, those that are not yet sent counted."""
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes a token; returns the text that can be sent."""
        self._tokens.append(token)
        text = self._decoded()
        return "" if text.endswith(_UNFINISHED) else self._give(text)

    def finish(self) -> str:
        """The rest, once no token follows."""
        if self.stopped:
            return ""
        rest = self._give(self._decoded())
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def spelled(self, token: int) -> str:
        """The text of a token that is to be added, by itself; special tokens by their names."""
        # some tokenizers drop the space before a word where nothing stands before it
        front = self._front if self.length else []
        before, text = (
            self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (front, [*front, token])
        )
        return text[len(before) :]

    @functools.cached_property
    def _front(self) -> list[int]:
        """What a token can stand behind."""
        return self._tokenizer("a", add_special_tokens=False)["input_ids"]

    def _decoded(self) -> str:
        before = decode(self._tokenizer, self._tokens[self._start : self._read])
        return decode(self._tokenizer, self._tokens[self._start :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._start, self._read = self._read, len(self._tokens)
            self.length += len(text)
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stop), default=1) - 1
        at = next(
            (
                i
                for i in range(max(0, len(text) - longest), len(text))
                if any(s.startswith(text[i:]) for s in self._stop)
            ),
            len(text),
        )
        self._held = text[at:]
        return text[:at]
