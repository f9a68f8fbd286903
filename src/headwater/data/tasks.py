"""Tasks: named sets of rows with a metric and a weight."""

from __future__ import annotations

import os
import random
import string
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from headwater.data.answers import commonest_share, number_after_mark
from headwater.data.rows import CHECK, SHOWN, Row, RowTemplate, collect_rows, one_screen
from headwater.data.sources import HUB_NAME, SUFFIXES
from headwater.errors import HeadwaterError, Problem
from headwater.paths import expanded

Metric = Literal["choice_accuracy", "exact_match", "final_number", "loss"]
SPLITS = ("train", "validation", "test")
SCORES = ("mean", "loss")
"""What evaluations during training come to over all tasks; they stand beside the tasks' own scores."""


class TaskSpec(BaseModel):
    """One entry of `tasks:` in a run file.

    Args:
        name: letters, digits, `.`, `_` and `-`; it names plots, files and log entries. Not one of `SCORES`.
        train, validation, test: a file, folder or hub data set each; a task without `train` is only evaluated.
        subset: configuration of a hub data set.
        train_split, validation_split, test_split: split of a data set to read for each of the three.
        prompt, completion, choices: for records with other field names, texts with fields in braces to make rows of:
            `prompt: "Question: {question}"`.
        metric: how held-out rows are scored. Without it `choice_accuracy` where rows have choices, else `loss`.
        weight: multiplies the task's share of the mixture.
        max_train_rows, max_test_rows: take this many rows at random, the same ones in every run; max_test_rows of the
            validation rows, too.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    train: str | None = Field(None, min_length=1)
    validation: str | None = Field(None, min_length=1)
    test: str | None = Field(None, min_length=1)
    subset: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    prompt: str | None = None
    completion: str | None = None
    choices: tuple[str, ...] = ()
    metric: Metric | None = None
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    max_train_rows: int | None = Field(None, ge=1)
    max_test_rows: int | None = Field(None, ge=1)

    @field_validator("name")
    @classmethod
    def _no_score_has_that_name(cls, name: str) -> str:
        if name in SCORES:
            what = f"no task can be called `{name}`: the score over all tasks is"
            raise HeadwaterError(Problem(what, "", "give it another name"))
        return name

    @field_validator("prompt", "completion", "choices")
    @classmethod
    def _braces_match(cls, value: Any) -> Any:
        for text in (value,) if isinstance(value, str) else value or ():
            list(string.Formatter().parse(text))
        return value

    @model_validator(mode="after")
    def _template_is_whole(self) -> TaskSpec:
        if (self.prompt is None) != (self.completion is None) or (self.choices and self.prompt is None):
            raise ValueError("prompt and completion come together, and choices need both")
        return self

    @property
    def template(self) -> RowTemplate | None:
        """How rows are made of records, if the spec says so."""
        if self.prompt is None or self.completion is None:
            return None
        return RowTemplate(self.prompt, self.completion, self.choices)


@dataclass
class Task:
    """A task with its rows.

    Args:
        index: position among the tasks; the task id that layers see.
        warnings: what may spoil its scores, e.g. test rows that are in the training set.
        notes: what was done to its rows, e.g. how many of them were taken.
    """

    name: str
    index: int
    metric: Metric
    weight: float = 1.0
    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_tasks(specs: Sequence[TaskSpec], base_dir: Path, *, all_problems: bool = False) -> list[Task]:
    """Read every file of every task.

    Args:
        specs: the tasks, in the order that gives them their ids.
        base_dir: folder that relative paths start from.
        all_problems: name every wrong row, however many there are.

    Raises:
        HeadwaterError: everything that is wrong with any task; unless `all_problems`, about a screen of it, and the
            rest counted.
    """
    problems: dict[str, list[Problem]] = {}
    if not specs:
        raise HeadwaterError(Problem("there are no tasks", "tasks", "name at least one, with a train or a test file"))
    names = [spec.name for spec in specs]
    for name, count in Counter(names).items():
        if count > 1:
            second = names.index(name, names.index(name) + 1)
            problems.setdefault("tasks", []).append(
                Problem(f"{count} tasks are called '{name}'", f"tasks[{second}].name", "give each a name of its own")
            )
    tasks = [_load(spec, index, base_dir, problems) for index, spec in enumerate(specs)]
    if found := one_screen(problems, sys.maxsize if all_problems else SHOWN, CHECK):
        raise HeadwaterError(*found)
    return tasks


def _load(spec: TaskSpec, index: int, base_dir: Path, problems: dict[str, list[Problem]]) -> Task:
    rows: dict[str, list[Row]] = {}
    notes: list[str] = []
    place = f"tasks[{index}] {spec.name}"
    for split in SPLITS:
        source = getattr(spec, split)
        if source is None:
            continue
        try:
            found, wrong = collect_rows(
                _resolve(source, base_dir),
                split=getattr(spec, f"{split}_split"),
                subset=spec.subset,
                template=spec.template,
                name=source,
            )
        except HeadwaterError as error:
            found, wrong = [], list(error.problems)
        if not found and not wrong:
            wrong = [Problem("has no rows", source, f"task '{spec.name}' needs at least one {split} row")]
        # A file that serves two splits or tasks is reported once.
        problems[source] = list(dict.fromkeys([*problems.get(source, []), *wrong]))
        limit = spec.max_train_rows if split == "train" else spec.max_test_rows
        rows[split] = _sample(found, limit, spec.name, split, notes)
    if not spec.train and not spec.test:
        where = f"tasks[{index}].name"
        problems.setdefault(place, []).append(
            Problem(f"task '{spec.name}' has neither `train` nor `test`", where, "give it one, or both")
        )
    metric = spec.metric or ("choice_accuracy" if any(row.choices for row in _all(rows)) else "loss")
    problems.setdefault(place, []).extend(_metric_problems(metric, rows, place))
    task = Task(spec.name, index, metric, spec.weight, notes=notes)
    task.train, task.validation, task.test = (rows.get(split, []) for split in SPLITS)
    task.warnings = _warnings(task)
    return task


def _resolve(source: str, base_dir: Path) -> str | Path:
    """The path below `base_dir` if there is one or it must be one, else the source as a hub data set's name."""
    path = base_dir / expanded(source, source)
    is_path = os.path.exists(path) or path.suffix in SUFFIXES or not HUB_NAME.fullmatch(source)
    return path if is_path else source


def _all(rows: dict[str, list[Row]]) -> Iterable[Row]:
    return (row for split in rows.values() for row in split)


def _sample(rows: list[Row], limit: int | None, name: str, split: str, notes: list[str]) -> list[Row]:
    if limit is None or len(rows) <= limit:
        return rows
    # The run's seed has no say: runs with several seeds must be scored on the same rows.
    chosen = sorted(random.Random(f"{name} {split}").sample(range(len(rows)), limit))
    notes.append(f"{split}: {limit:,} of {len(rows):,} rows of {rows[0].source}, drawn at random")
    return [rows[i] for i in chosen]


def _metric_problems(metric: Metric, rows: dict[str, list[Row]], place: str) -> list[Problem]:
    scored = [*rows.get("validation", []), *rows.get("test", [])]
    if metric == "choice_accuracy":
        bad = [row for row in scored if not row.choices]
        what, fix = "have no choices, which choice_accuracy needs", "give them some"
    elif metric == "final_number":
        bad = [row for row in scored if number_after_mark(row.completion) is None]
        what, fix = "have no number after ####, which final_number needs", "end completions like: #### 42"
    else:
        return []
    if not bad:
        return []
    return [
        Problem(
            f"{place}: {len(bad):,} of {len(scored):,} held-out rows {what}",
            bad[0].where,
            f"{fix}, or name another metric",
        )
    ]


def input_of(row: Row) -> Any:
    """What the model is given. Two rows with the same one are the same question."""
    if row.messages:
        return tuple((m["role"], m["content"]) for m in row.messages[:-1])
    return " ".join((row.prompt or row.completion).split())


def overlap(task: Task) -> int:
    """How many test rows ask what a training or validation row asks, white space aside."""
    known = {input_of(row) for row in (*task.train, *task.validation)}
    return sum(input_of(row) in known for row in task.test)


def majority(rows: Sequence[Row], metric: str) -> float | None:
    """What always giving the commonest answer scores. None without rows, and for metrics by which it is no measure."""
    if not rows or metric not in ("choice_accuracy", "exact_match"):
        return None
    return commonest_share(row.completion for row in rows)


def _warnings(task: Task) -> list[str]:
    found = []
    if count := overlap(task):
        found.append(f"{count:,} of {len(task.test):,} test rows have a prompt that is also trained or validated on")
    for split in SPLITS:
        rows = getattr(task, split)
        if repeated := len(rows) - len({(input_of(row), row.completion) for row in rows}):
            found.append(f"{split}: {repeated:,} of {len(rows):,} rows repeat an earlier one")
        if spaced := sum(row.prompt.endswith(" ") for row in rows):
            found.append(
                f"{split}: {spaced:,} of {len(rows):,} prompts end with a space; most tokenisers want it at the start "
                "of the completion"
            )
    return found


def describe(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """What the tasks hold, as plain values: per task its metric and weight, rows and files per split, the share of the
    commonest test answer, the number of test prompts that are trained on, warnings and notes."""
    return [
        {
            "task": task.name,
            "index": task.index,
            "metric": task.metric,
            "weight": task.weight,
            "splits": {
                split: {"rows": len(rows), "files": dict(Counter(row.source for row in rows))}
                for split in SPLITS
                if (rows := getattr(task, split))
            },
            "majority": majority(task.test, task.metric),
            "overlap": overlap(task),
            "warnings": list(task.warnings),
            "notes": list(task.notes),
        }
        for task in tasks
    ]
