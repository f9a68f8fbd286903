"""Validation rows to choose a learning rate on: the tasks' own, or some that are taken out of their training rows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.data.rows import Row
from headwater.data.tasks import Task, input_of, load_tasks
from headwater.errors import HeadwaterError, Problem
from headwater.files import write_text

if TYPE_CHECKING:
    from headwater.config import RunConfig

SHARE, MOST = 0.1, 200
"""Of a task without validation rows, this share of its training rows chooses, but at most so many."""


def choosing_tasks(config: RunConfig, folder: Path, methods: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The `tasks:` section of runs that choose: what is trained on and, as their test rows, what chooses.

    The rows are written to `folder` as JSONL files, the same ones in every call. The tasks' test rows are in neither;
    a task that has no others is left out.

    Args:
        methods: the `method:` sections of the runs.

    Raises:
        HeadwaterError: if the tasks cannot be read, or some are left without rows, with file and line; if one is left
            out and a method is told of tasks by their place.
    """
    try:
        tasks = load_tasks(config.tasks, config.base_dir)
        splits = _splits(tasks)
        if any(_goes_by_place(method) for method in methods):
            _refuse_left_out(tasks, splits)
    except HeadwaterError as error:
        raise config.placed(error) from error
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for task, (train, chosen) in zip(tasks, splits, strict=True):
        section = {"name": task.name, "metric": task.metric, "weight": task.weight}
        for key, rows in (("train", train), ("test", chosen)):
            if rows:
                path = folder / f"{task.name}-{key}.jsonl"
                write_text(path, "".join(json.dumps(_fields(row), ensure_ascii=False) + "\n" for row in rows))
                section[key] = str(path.absolute())
        if train or chosen:
            sections.append(section)
    return sections


def _splits(tasks: Sequence[Task]) -> list[tuple[list[Row], list[Row]]]:
    """Per task what is trained on and what chooses."""
    splits = [hold_out(task) if task.train and not task.validation else (task.train, task.validation) for task in tasks]
    problems = [
        Problem(
            f"task {task.name} has too few different training rows to take some out of them",
            f"tasks[{task.index}].train",
            "give it `validation:` rows",
        )
        for task, (train, _) in zip(tasks, splits, strict=True)
        if task.train and not train
    ]
    if problems:
        raise HeadwaterError(*problems)
    return splits


def _goes_by_place(method: Mapping[str, Any]) -> bool:
    """What an earlier adapter learnt of each task, and types of tasks, are by the tasks' order."""
    return "num_tasks" in method and bool(method.get("continue_from") or method.get("task_types"))


def _refuse_left_out(tasks: Sequence[Task], splits: Sequence[tuple[list[Row], list[Row]]]) -> None:
    problems = [
        Problem(
            f"task {task.name} has only test rows, which choose nothing, and without it others would take its place",
            f"tasks[{task.index}]",
            "give it `validation:` rows",
        )
        for task, (train, chosen) in zip(tasks, splits, strict=True)
        if not (train or chosen)
    ]
    if problems:
        raise HeadwaterError(*problems)


def hold_out(task: Task) -> tuple[list[Row], list[Row]]:
    """A task's training rows in two: those that stay, and those that choose. No prompt is in both."""
    count = max(1, min(MOST, round(SHARE * len(task.train))))
    taken = set(random.Random(f"{task.name} validation").sample(range(len(task.train)), count))
    chosen = [row for index, row in enumerate(task.train) if index in taken]
    asked = {input_of(row) for row in chosen}
    return [row for row in task.train if input_of(row) not in asked], chosen


def _fields(row: Row) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": row.prompt, "completion": row.completion}
    if row.messages:
        fields = {"messages": row.messages}
    return {**fields, "choices": row.choices} if row.choices else fields


def quality(results: Mapping[str, Any], trained: Sequence[str]) -> float | None:
    """How good a run is on what chooses: the mean score of the tasks that it was trained on; where all of them are
    losses, minus their mean; None if it diverged."""
    if "diverged" in results:
        return None
    tasks = [task for name, task in results["tasks"].items() if name in trained]
    scores = [task["after"] for task in tasks if task["metric"] != "loss"]
    return sum(scores) / len(scores) if scores else -sum(task["after"] for task in tasks) / len(tasks)


def best_rate(scores: Mapping[float, float | None]) -> tuple[float, str]:
    """The learning rate with the best score, the smaller of two equal ones, and what has to be said about it. Those
    whose score is None diverged."""
    known = {rate: score for rate, score in scores.items() if score is not None}
    best = max(known, key=lambda rate: (known[rate], -rate))
    too_high = ", ".join(f"{rate:g}" for rate in sorted(scores.keys() - known.keys()))
    said = f"; {too_high} diverged" if too_high else ""
    if len(scores) == 1 or min(scores) < best < max(scores):
        return best, said
    if len(known) > 1 and len(set(known.values())) == 1:
        return best, f", the smallest: all that were tried score the same{said}"
    edge = "smallest" if best == min(scores) else "largest"
    return best, f", the {edge} tried: a wider grid may have a better one{said}"
