"""Best of n: several adapters are drawn for a task, and the one that scores highest on validation rows is kept."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from ..data.encode import DataSpec
from ..data.tasks import Task
from ..errors import HeadwaterError, Problem
from ..evaluation import EvaluationSpec, TaskScore, score_task
from .collect import with_adapter
from .layout import Layout, write_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Draw(Protocol):
    """Makes an adapter `(L,)` of a seed; of None, the likeliest one (z = 0)."""

    def __call__(self, *, seed: int | None) -> Tensor: ...


@dataclass(frozen=True)
class Best:
    """The best of several adapters.

    Args:
        weights: the adapter, `(L,)`.
        seed: of its z; None for z = 0.
        score: its score.
        scores: of all of them, z = 0 first, then by seed.
    """

    weights: Tensor
    seed: int | None
    score: float
    scores: list[float]


def best_of(draw: Draw, count: int, score: Callable[[Tensor], float], *, seed: int = 0) -> Best:
    """The best of `count` adapters: the likeliest one (z = 0) and `count - 1` draws; of equals the earliest.

    Args:
        draw: for instance `functools.partial(generator.for_task, "news")`.
        score: of an adapter `(L,)`; more is better. On rows that nothing else is scored on: the best of several scores
            says too much of the adapter that has it.
        seed: of the first draw; the others have the ones after it.

    Raises:
        HeadwaterError: `count` is below 1, or no score is a finite number.
    """
    if count < 1:
        raise HeadwaterError(Problem(f"count is {count}, and at least one adapter has to be made", "count"))
    best, scores = None, []
    for one in (None, *range(seed, seed + count - 1)):
        weights = draw(seed=one)
        scores.append(score(weights))
        if math.isfinite(scores[-1]) and (best is None or scores[-1] > best.score):
            best = Best(weights, one, scores[-1], scores)
    if best is None:
        raise HeadwaterError(Problem(f"none of {count} adapters has a finite score", fix="train the generator again"))
    return best


def score_adapter(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    weights: Tensor,
    task: Task,
    spec: EvaluationSpec,
    data_spec: DataSpec,
) -> TaskScore:
    """The score of an adapter `(L,)` on a task's test rows; the base model is afterwards as it was.

    Raises:
        HeadwaterError: as `headwater.evaluation.score_task`.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder) / "adapter", layout, weights)
        adapted = with_adapter(model, Path(folder) / "adapter")
        try:
            return score_task(adapted, tokenizer, task, task.test, spec, data_spec)
        finally:
            adapted.unload()
