"""Score tasks: the metric that a task names, over rows that the model was not trained on."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from headwater.data.encode import IGNORED, DataSpec, Encoded, EncodingReport, encode_rows
from headwater.data.rows import one_screen
from headwater.data.tasks import majority
from headwater.errors import DivergedError, HeadwaterError, Problem
from headwater.evaluation.asked import Asked, choice_ids, generation_ids
from headwater.evaluation.forward import evaluating, max_positions, pad_id
from headwater.evaluation.generate import generate_from_ids
from headwater.evaluation.intervals import interval
from headwater.evaluation.likelihood import choice_log_probs, completion_losses
from headwater.evaluation.metrics import GENERATION_METRICS
from headwater.evaluation.scores import Progress, TaskScore
from headwater.evaluation.spec import ChoiceNormalization, EvaluationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwater.data.rows import Row
    from headwater.data.tasks import Task

logger = logging.getLogger(__name__)

METRICS = ("choice_accuracy", *GENERATION_METRICS, "loss")
_EXAMPLES = 3  # generated answers kept in a score's detail


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
    """Score `rows` with the metric of `task`.

    The model may be a plain transformers model or a PEFT model; where its method goes by task, the task's index is
    passed. Its modes and torch's random state are afterwards as they were.

    Args:
        rows: the rows to score, e.g. `task.test`.
        progress: called with the task's name, rows done and rows in all, after every batch.

    Raises:
        HeadwaterError: no rows, an unknown metric, rows that the metric cannot score, or prompts too long for the
            model; every such row is named (the first 20).
    """
    done = 0

    def on_batch(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(task.name, done, len(rows))

    scorer = _SCORERS.get(task.metric)
    if scorer is None:
        raise HeadwaterError(Problem(f"unknown metric {task.metric!r}", task.name, f"Use one of {', '.join(METRICS)}."))
    if not rows:
        raise HeadwaterError(Problem("no rows to score", task.name, "Give the task a test file with at least one row."))
    with evaluating(model):
        return scorer(Asked(model, tokenizer, task, rows, spec, data_spec), on_batch)


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
    """Score every task that has rows in `split`.

    Args:
        split: `train`, `validation` or `test`.
        max_rows: at most so many rows of each task, drawn with a fixed seed, so that every call scores the same ones.
        progress: as in `score_task`.

    Returns:
        Task name -> score, in the order of `tasks`.
    """
    scores = {}
    for task in tasks:
        rows = sample(getattr(task, split), max_rows)
        if rows:
            scores[task.name] = score_task(model, tokenizer, task, rows, spec, data_spec, progress=progress)
    return scores


def check_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    spec: EvaluationSpec,
    data_spec: DataSpec,
    *,
    split: str = "test",
    max_rows: int | None = None,
) -> None:
    """Refuses rows that `score_tasks` would refuse, without scoring any: before what takes long, or replaces something.

    Raises:
        HeadwaterError: as `score_tasks`, for all tasks at once.
    """
    problems: dict[str, Sequence[Problem]] = {}
    for task in tasks:
        rows = sample(getattr(task, split), max_rows)
        try:
            if rows and task.metric in _IDS:
                _IDS[task.metric](Asked(model, tokenizer, task, rows, spec, data_spec))
        except HeadwaterError as error:
            problems[task.name] = error.problems
    if wrong := one_screen(problems):
        raise HeadwaterError(*wrong)


def sample(rows: Sequence[Row], max_rows: int | None) -> list[Row]:
    """At most `max_rows` of `rows`, in their order: the same ones every time, from everywhere in the file."""
    if max_rows is None or len(rows) <= max_rows:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), max_rows))]


def _score_choices(asked: Asked, on_batch: Callable[[int], None]) -> TaskScore:
    rows, spec = asked.rows, asked.spec
    prompts, choices, detail_of_ids = choice_ids(asked)
    log_probs = choice_log_probs(
        asked.model,
        prompts,
        choices,
        fill=pad_id(asked.tokenizer),
        task_index=asked.task.index,
        batch_size=spec.batch_size,
        on_batch=on_batch,
    )
    _refuse_nan(asked.task, rows, map(sum, log_probs))
    picked = [
        row.choices[_best(sums, row.choices, ids, spec.choice_normalization)]
        for row, sums, ids in zip(rows, log_probs, choices, strict=True)
    ]
    detail: dict[str, Any] = {
        "normalization": spec.choice_normalization,
        "chance": sum(1 / len(r.choices) for r in rows) / len(rows),
        **detail_of_ids,
    }
    if len({frozenset(row.choices) for row in rows}) == 1:
        counts = Counter(picked)
        detail["predicted_shares"] = {choice: counts[choice] / len(rows) for choice in rows[0].choices}
    correct = [float(choice == row.completion) for choice, row in zip(picked, rows, strict=True)]
    return _score(asked.task, rows, correct, detail)


def _best(
    log_probs: Sequence[float], texts: Sequence[str], ids: Sequence[Sequence[int]], by: ChoiceNormalization
) -> int:
    """Index of the likeliest choice; the first one among equals."""
    sizes = {"none": [1] * len(ids), "tokens": [len(i) for i in ids], "bytes": [len(t.encode()) for t in texts]}[by]
    values = [total / size for total, size in zip(log_probs, sizes, strict=True)]
    return values.index(max(values))


def _score_generated(asked: Asked, on_batch: Callable[[int], None]) -> TaskScore:
    rows, metric = asked.rows, GENERATION_METRICS[asked.task.metric]
    prompts, cut = generation_ids(asked)
    answers = generate_from_ids(
        asked.model,
        asked.tokenizer,
        prompts,
        task_index=asked.task.index,
        max_new_tokens=asked.spec.max_new_tokens,
        batch_size=asked.spec.batch_size,
        settled=lambda i, text: metric.settled(text, rows[i].completion),
        on_batch=on_batch,
    )
    correct = [metric.score(answer.text, row.completion) for answer, row in zip(answers, rows, strict=True)]
    detail = {
        "unfinished": sum(not answer.finished for answer in answers),
        "examples": [
            {"prompt": row.prompt, "reference": row.completion, "generated": answer.text}
            for row, answer in list(zip(rows, answers, strict=True))[:_EXAMPLES]
        ],
        **cut,
    }
    return _score(asked.task, rows, correct, detail)


def _score_loss(asked: Asked, on_batch: Callable[[int], None]) -> TaskScore:
    task, rows = asked.task, asked.rows
    encoded, report = _loss_ids(asked)
    losses = completion_losses(
        asked.model,
        [row.input_ids for row in encoded],
        [row.labels for row in encoded],
        fill=pad_id(asked.tokenizer),
        task_index=task.index,
        batch_size=asked.spec.batch_size,
        on_batch=on_batch,
    )
    _refuse_nan(task, rows if len(encoded) == len(rows) else (), (total for total, _ in losses))
    counted = [(total / count, count) for total, count in losses if count]
    means, weights = zip(*counted, strict=True)
    fates = {"dropped_rows": sum(report.dropped.values()), "shortened_prompts": sum(report.truncated.values())}
    detail = {"tokens": sum(weights), **{fate: count for fate, count in fates.items() if count}}
    return _score(task, rows, list(means), detail, list(weights))


def _loss_ids(asked: Asked) -> tuple[list[Encoded], EncodingReport]:
    task, limit = asked.task, max_positions(asked.model)
    encoded, report = encode_rows(asked.rows, asked.tokenizer, asked.data_spec, task.index, limit)
    if all(label == IGNORED for row in encoded for label in row.labels[1:]):  # nothing predicts a row's first token
        what, fix = "no row has a token to score", ""
        if dropped := sum(report.dropped.values()):
            what += f": {dropped:,} of {len(asked.rows):,} are too long, and data.on_too_long: drop leaves them out"
            fix = "raise data.max_length if the model takes more, or set data.on_too_long to truncate_prompt"
        raise HeadwaterError(Problem(what, task.name, fix))
    return encoded, report


_SCORERS: dict[str, Callable[..., TaskScore]] = {
    "choice_accuracy": _score_choices,
    **dict.fromkeys(GENERATION_METRICS, _score_generated),
    "loss": _score_loss,
}
_IDS: dict[str, Callable[..., Any]] = {
    "choice_accuracy": choice_ids,
    **dict.fromkeys(GENERATION_METRICS, generation_ids),
    "loss": _loss_ids,
}
"""What a metric's scorer begins with; it refuses rows that cannot be scored."""


def _score(
    task: Task,
    rows: Sequence[Row],
    correct: list[float],
    detail: dict[str, Any],
    weights: list[float] | None = None,
) -> TaskScore:
    value = float(np.average(correct, weights=weights))
    ends = interval(correct, weights)
    detail = {"interval": ends and list(ends), **detail}
    most = majority(rows, task.metric)
    return TaskScore(task.name, task.metric, value, len(correct), most, correct, detail, weights)


def _refuse_nan(task: Task, rows: Sequence[Row], values: Iterable[float]) -> None:
    """A diverged model must not pass for one that always takes the first choice."""
    bad = [i for i, value in enumerate(values) if not value < math.inf]
    if bad:
        fix = "Its weights have most likely diverged: take an earlier checkpoint, or train at a lower learning rate."
        where = rows[bad[0]].where if rows else task.name
        raise DivergedError(
            Problem(f"the model's outputs are not finite numbers (NaN or infinity) on {len(bad)} rows", where, fix)
        )
