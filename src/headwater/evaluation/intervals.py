"""How far a score could be off, given how few rows it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_Z95 = 1.959963984540054  # the standard normal's 97.5 % point
_RESAMPLES = 2000


def interval(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """95 % interval of the mean of per-row scores.

    Wilson's score interval when every value is 0 or 1: unlike the usual mean ± 1.96 standard errors it stays inside
    [0, 1] and keeps a width when all rows are right or all are wrong. Else the bootstrap's percentiles, from 2,000
    resamples with a fixed seed, so that the same values always give the same interval.

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
    weight = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES):
        draw = generator.integers(n, size=n)
        means.append(np.average(scores[draw], weights=weight[draw]))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
