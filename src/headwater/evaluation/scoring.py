"""Score tasks: the metric that a task names, over rows that the model was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headwater.evaluation.scores import Progress, TaskScore
from headwater.evaluation.spec import EvaluationSpec

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from headwater.data.encode import DataSpec
    from headwater.data.rows import Row
    from headwater.data.tasks import Task


def score_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    spec: EvaluationSpec,
    data_spec: DataSpec,
    *,
    progress: Progress | None = None,
) -> TaskScore:
    """Score `rows` with the metric of `task`."""
    raise NotImplementedError


def score_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    spec: EvaluationSpec,
    data_spec: DataSpec,
    *,
    split: str = "test",
    max_rows: int | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskScore]:
    """Score every task that has rows in `split`, at most `max_rows` of each (the same ones every time)."""
    raise NotImplementedError
