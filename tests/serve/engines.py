"""Engines on the tiny model, and what a request alone would have been answered."""

from __future__ import annotations

import contextlib
import functools
import threading

import torch
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater.serve import Engine, Piece, Route


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 40 byte tokens, all different."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 41, (count,), generator=generator).tolist()
    return [[i % 250, *torch.randint(0, 250, (n,), generator=generator).tolist()] for i, n in enumerate(lengths)]


@contextlib.contextmanager
def running(routes, **options):
    engine = Engine(routes, make_tiny_tokenizer(), **{"max_waiting": 10_000, **options})
    try:
        yield engine
    finally:
        engine.close()


def burst(engine, *asked) -> list[list[Piece]]:
    """All at once, so that they are admitted together; each has to end."""
    answers: list[list[Piece]] = [[] for _ in asked]
    ended = threading.Semaphore(0)

    def take(answer, piece):
        answer.append(piece)
        if piece.finish:
            ended.release()

    with engine._wake:
        for answer, (prompt, route, sampling) in zip(answers, asked, strict=True):
            engine.submit(prompt, route, sampling, functools.partial(take, answer))
    for _ in asked:
        assert ended.acquire(timeout=120), answers
    return answers


class Plain:
    """Routes over a bare model: one choice."""

    def __init__(self, model=None):
        self.model = model or sharp_llama()
        self.names = ["plain"]

    def choose(self, name, text):
        return Route(name)

    @contextlib.contextmanager
    def apply(self, routes):
        yield {}


def sharp_llama(seed: int = 0, **fields):
    """A tiny model that looks at some places more than at others, so that positions count, and whose likeliest token is
    well ahead of the second, so that rounding cannot change an answer.
    """
    model = make_tiny_llama(seed, **fields)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(30)
            for projection in ("q_proj", "k_proj", "o_proj"):
                getattr(layer.self_attn, projection).weight.mul_(30)
    return model


def endless_llama():
    """One whose greedy answers do not come to an end of their own."""
    model = sharp_llama(max_position_embeddings=30_000)
    model.lm_head.weight.data[257] = 0
    return model


@torch.no_grad()
def alone(model, prompt, max_tokens, **keywords):
    """Greedy tokens of one prompt by itself: each from a forward over all that is there so far, without a cache."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), **keywords).logits[0, -1].argmax()))
        if ids[-1] == 257:
            break
    return ids[len(prompt) :]


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [piece.token for piece in pieces if piece.token is not None]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)
