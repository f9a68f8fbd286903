"""How far a score could be off, given how few rows it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_Z95 = 1.959963984540054  # the standard normal's 97.5 % point
_RESAMPLES = 2000


def interval(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float] | None:
    """95 % interval of the mean of per-row scores.

    Wilson's score interval when every value is 0 or 1: unlike the usual mean ± 1.96 standard errors it stays inside
    [0, 1] and keeps a width when all rows are right or all are wrong. Else the bootstrap's percentiles, from 2,000
    resamples with a fixed seed, so that the same values always give the same interval. None where the bootstrap has but
    one value, once or often: resamples of it are all the same, which does not mean that other rows would be.

    Args:
        weights: of the rows, > 0, for a weighted mean; always the bootstrap then.

    Raises:
        ValueError: `values` is empty.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    scores = np.asarray(values, dtype=np.float64)
    n, mean = len(scores), float(scores.mean())
    if weights is None and np.isin(scores, (0.0, 1.0)).all():
        shrink = 1 + _Z95**2 / n
        centre = (mean + _Z95**2 / (2 * n)) / shrink
        half = _Z95 * math.sqrt(mean * (1 - mean) / n + _Z95**2 / (4 * n * n)) / shrink
        # The ends may miss a share of 0 or 1 by a rounding error.
        return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))
    if (scores == scores[0]).all():
        return None
    weight = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES):
        draw = generator.integers(n, size=n)
        means.append(np.average(scores[draw], weights=weight[draw]))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def t_interval(values: Sequence[float], within: tuple[float, float] | None = None) -> tuple[float, float] | None:
    """95 % interval of the mean of a few values, by Student's t; None where they tell no spread: one, or all equal.

    Scores come in whole rows, so two seeds often differ by the same; another seed would not have to.

    Args:
        within: bounds that no value can leave, such as (0, 1) for scores. The interval is cut there: the mean lies
            inside anyway, so nothing that it could be is lost.
    """
    n = len(values)
    if n < 2 or max(values) - min(values) < 1e-12:
        return None
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = t_quantile(n - 1) * error
    low, high = within or (-math.inf, math.inf)
    return max(low, mean - half), min(high, mean + half)


def t_quantile(df: int) -> float:
    """The 97.5 % point of Student's t with `df` >= 1 degrees of freedom, to 12 digits.

    Bisection on the finite sums for P(|t| < sqrt(df) tan(theta)), Abramowitz and Stegun, 26.7.3 and 26.7.4; scipy would
    be a large dependency for one number.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, df) < 0.95 else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


def _t_within(theta: float, df: int) -> float:
    odd = df % 2
    term, total = (math.cos(theta), 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total
