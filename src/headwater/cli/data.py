"""`headwater data check`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from headwater.cli.console import out_console, table
from headwater.errors import HeadwaterError


def run_check(file: str, overrides: Sequence[str], *, as_json: bool) -> None:
    """Read all rows of a run's tasks and print what they hold.

    Raises:
        HeadwaterError: with everything that is wrong in the config or the rows.
    """
    from headwater.config import TasksFile, load_config
    from headwater.data.tasks import describe, load_tasks

    config = load_config(file, overrides, model=TasksFile)
    try:
        found = describe(load_tasks(config.tasks, config.base_dir, all_problems=True))
    except HeadwaterError as error:
        raise config.placed(error) from error
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    console = out_console()
    splits = ("train", "validation", "test")
    rows = [
        [
            task["task"],
            task["metric"],
            *(_count(task, split) for split in splits),
            _share(task["majority"]),
            task["overlap"],
        ]
        for task in found
    ]
    console.print(table(["task", "metric", *splits, "always the same answer", "in train too"], rows))
    for task in found:
        for warning in task["warnings"]:
            console.print(Text.assemble((f"{task['task']}: ", "bold"), (warning, "yellow")))
        for note in task["notes"]:
            console.print(Text.assemble((f"{task['task']}: ", "bold"), note))


def _count(task: dict[str, Any], split: str) -> str | None:
    return f"{task['splits'][split]['rows']:,}" if split in task["splits"] else None


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
