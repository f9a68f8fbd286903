"""`headwater evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.adapters import Source, adapter_fields, load, locate
from headwater.cli.console import err_console, out_console, table
from headwater.errors import HeadwaterError, Problem
from headwater.files import check_file, write_json

if TYPE_CHECKING:
    from torch import nn

    from headwater.config import RunConfig
    from headwater.data.tasks import Task
    from headwater.evaluation import TaskScore

SPLITS = ("test", "validation", "train")
READ = ("model_name_or_path", "model", "tasks", "data", "evaluation", "training.use_cpu")
"""The keys of a run's file that scoring goes by."""


def refuse(options: dict[str, object], fix: str) -> None:
    """Refuses options that the others make meaningless.

    Args:
        options: name -> value; None or False where it was not given.

    Raises:
        HeadwaterError: naming every one that was given.
    """
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise HeadwaterError(*(Problem("the option does not apply here", name, fix) for name in given))


def require_effect(overrides: Sequence[str], read: Collection[str]) -> None:
    """Refuses overrides of keys of a run's file that make no difference here; unknown keys are left to who reads them.

    Args:
        overrides: texts like ``evaluation.batch_size=2``.
        read: the keys that do, as ``evaluation`` with all below it or ``evaluation.batch_size``.

    Raises:
        HeadwaterError: naming every other one.
    """
    from headwater.config import TasksFile

    problems = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        first = key.partition(".")[0]
        if first not in TasksFile.model_fields:
            continue
        if not any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in read):
            what = "the adapter stays as it was trained" if first == "method" else "scoring does not go by this key"
            problems.append(Problem(f"this has no effect: {what}", f"--set {override}", "leave it out"))
    if problems:
        raise HeadwaterError(*problems)


def run(source: str, tasks_file: str | None, split: str, output: str | None, overrides: Sequence[str]) -> None:
    """Score an adapter on its run's tasks, or those of a file; print a table, write JSON where asked to.

    Raises:
        HeadwaterError: no adapter, no tasks, rows that cannot be scored, or overrides that have no effect.
    """
    if split not in SPLITS:
        raise HeadwaterError(Problem(f"unknown split {split!r}", "--split", f"one of {', '.join(SPLITS)}"))
    if output is not None:
        check_file(output, "--output")
    require_effect(overrides, READ)
    found = locate(source)
    config = _what_to_score(found, tasks_file, overrides)
    if config.where("model_name_or_path").startswith("--set"):  # what a tasks file names is not the run's
        found = dataclasses.replace(found, other_base=config.model_name_or_path)

    from headwater.data.tasks import load_tasks
    from headwater.evaluation import mean_score, score_tasks

    try:
        tasks = [_with_trained_index(task, found) for task in load_tasks(config.tasks, config.base_dir)]
    except HeadwaterError as error:
        raise config.placed(error) from error
    if not any(getattr(task, split) for task in tasks):
        raise HeadwaterError(Problem(f"no task has {split} rows", config.where("tasks"), "give --split or --tasks"))
    model, tokenizer = load(found, config)
    _refuse_unknown_tasks(model, tasks, found)
    with err_console().status("scoring") as status:
        scores = score_tasks(
            model,
            tokenizer,
            tasks,
            config.evaluation,
            config.data,
            split=split,
            progress=lambda task, done, total: status.update(f"{task}: {done} of {total} rows"),
        )
    rows = []
    for score in scores.values():
        ends = score.detail["interval"]
        shown = ends and f"{ends[0]:.3f} - {ends[1]:.3f}"
        rows.append([score.task, score.metric, score.n, f"{score.value:.3f}", shown, _share(score)])
    mean = mean_score(scores.values())
    if mean is not None:
        rows.append(["mean", "", "", f"{mean:.3f}", "", ""])
    out_console().print(table(["task", "metric", "rows", "score", "95 % interval", "always the same answer"], rows))
    if output is not None:
        write_json(Path(output), _as_json(found, split, scores, mean))
        err_console().print(f"wrote {output}", soft_wrap=True, highlight=False)


def _what_to_score(found: Source, tasks_file: str | None, overrides: Sequence[str]) -> RunConfig:
    """The run's config with overrides, or the tasks file; the run's settings hold for each key that is not in that."""
    from headwater.config import TasksFile, load_config

    if tasks_file is None:
        if found.run_file is None:
            fix = "give --tasks FILE, or the run folder, whose config.yaml lists the tasks"
            raise HeadwaterError(Problem("the adapter alone does not say what to score it on", str(found.adapter), fix))
        return load_config(found.run_file, overrides)
    config = load_config(tasks_file, overrides, model=TasksFile)
    if found.config is not None:
        for section in ("model", "data", "evaluation"):
            own, of_run = getattr(config, section), getattr(found.config, section)
            given = {key: getattr(own, key) for key in own.model_fields_set}
            setattr(config, section, of_run.model_copy(update=given))
        config.training = {**found.config.training, **config.training}
    return config


def _with_trained_index(task: Task, found: Source) -> Task:
    """The task with the id it was trained under; its position says nothing where tasks come from another file."""
    names = [spec.name for spec in found.config.tasks] if found.config else []
    return dataclasses.replace(task, index=names.index(task.name)) if task.name in names else task


def _refuse_unknown_tasks(model: nn.Module, tasks: Sequence[Task], found: Source) -> None:
    from headwater.tuner import needs_task_ids

    names = [spec.name for spec in found.config.tasks] if found.config else []
    if not names or not needs_task_ids(model):
        return
    problems = [
        Problem(
            f"the adapter goes by task and was not trained on `{task.name}`", "tasks", f"it knows {', '.join(names)}"
        )
        for task in tasks
        if task.name not in names
    ]
    if problems:
        raise HeadwaterError(*problems)


def _share(score: TaskScore) -> str | None:
    return None if score.majority is None else f"{score.majority:.3f}"


def _as_json(found: Source, split: str, scores: dict[str, TaskScore], mean: float | None) -> dict[str, Any]:
    return {
        "schema": 1,
        "adapter": str(found.adapter),
        "method": str(adapter_fields(found.adapter).get("peft_type", "")).lower(),
        "base_model": found.base_model,
        "split": split,
        "tasks": {
            name: {
                "metric": score.metric,
                "n": score.n,
                "value": score.value,
                "majority": score.majority,
                "detail": score.detail,
            }
            for name, score in scores.items()
        },
        "mean": mean,
    }
