"""What an evaluation says about a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called after every batch of rows with the task's name, the rows done so far and the rows in all."""


@dataclass(frozen=True)
class TaskScore:
    """The score of one task.

    Args:
        task: the task's name.
        metric: `choice_accuracy`, `exact_match`, `final_number` or `loss`.
        value: mean over rows, in [0, 1]; for `loss` the mean over completion tokens of -log p, in nats.
        n: rows scored.
        majority: share of the most frequent right answer, which is what a model gets that always says the same; None
            for `final_number` and `loss`.
        correct: one value per row, in the order of the rows: 1.0 or 0.0; for `loss` the row's mean -log p.
        detail: more about it, all of it fit for JSON: `interval` (95 %, low and high, or None); for choices
            `normalization`, `chance` and, where all rows have the same, `predicted_shares`; for generated answers
            `examples` and `unfinished`; for `loss` `tokens`; `shortened_prompts` and `dropped_rows` where the data's
            settings allow such.
        weights: how much each of `correct` counts in `value`: for `loss` the row's tokens; None where all count alike.
    """

    task: str
    metric: str
    value: float
    n: int
    majority: float | None
    correct: list[float]
    detail: dict[str, Any] = field(default_factory=dict)
    weights: list[float] | None = None


def mean_score(scores: Iterable[TaskScore]) -> float | None:
    """Mean of the tasks' values, each task counting once; `loss` is no score and stays out. None if nothing is left."""
    values = [score.value for score in scores if score.metric != "loss"]
    return sum(values) / len(values) if values else None
