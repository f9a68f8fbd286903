"""Preference pairs from scored responses, always within one prompt."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """Two responses to the same prompt, by position: of the prompt in the batch, of the responses among the prompt's.

    Args:
        gap: score of the chosen response minus that of the rejected one, > 0.
    """

    prompt: int
    chosen: int
    rejected: int
    gap: float


def make_pairs(
    scores: Sequence[Sequence[float]],
    *,
    per_prompt: int,
    min_gap: float = 0.0,
    best_only: bool = False,
    seed: int | str = 0,
) -> list[Pair]:
    """At most `per_prompt` pairs of each prompt, drawn evenly from those whose scores differ by more than `min_gap`.

    With `min_gap` 0 only the order of the scores counts: any increasing transform of them gives the same pairs.

    Args:
        scores: per prompt a score for each of its responses, which are all different texts.
        best_only: pair the best response with each worse one only, and draw one of these.
        seed: of the draw.
    """
    draw = random.Random(str(seed))
    found = []
    for prompt, values in enumerate(scores):
        ordered = [
            Pair(prompt, a, b, values[a] - values[b])
            for a, b in itertools.permutations(range(len(values)), 2)
            if values[a] - values[b] > min_gap
        ]
        if best_only and ordered:
            # Of equally good responses the first: which one that is, sampling has decided.
            best = max(range(len(values)), key=lambda i: (values[i], -i))
            ordered = [pair for pair in ordered if pair.chosen == best]
        found += draw.sample(ordered, min(1 if best_only else per_prompt, len(ordered)))
    return found


def mean_of_standardised(scores: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The mean over sources of their scores, each brought to mean 0 and deviation 1 within each prompt first.

    Args:
        scores: per source, per prompt, a score for each response; a source whose scores are all equal adds nothing.
    """
    means = []
    for per_source in zip(*scores, strict=True):
        standard = [_standardised(values) for values in per_source]
        means.append([sum(column) / len(standard) for column in zip(*standard, strict=True)])
    return means


def _standardised(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / deviation if deviation > 0 else 0.0 for v in values]
