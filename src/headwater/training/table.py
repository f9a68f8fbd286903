"""What a run came to, as a table for the screen."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show_scores(results: dict[str, Any], console: Console) -> None:
    """Print the per-task table of a ``results.json``: scores before and after, the gain, and the majority's share.

    A gain is what has become better: of a loss, by how much it has sunk. Where nothing was scored, that is said.
    """
    if not results["tasks"]:
        console.print("no task has test rows, so nothing was scored", highlight=False)
        _show_time(results, console)
        return
    table = Table()
    for column in ("task", "metric", "rows", "always the same answer", "before", "after", "gain"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, task in results["tasks"].items():
        majority = results["extra"]["majority"].get(name)
        gain = task["after"] - task["before"]
        table.add_row(
            name,
            task["metric"],
            str(task["n"]),
            "" if majority is None else f"{majority:.3f}",
            f"{task['before']:.3f}",
            f"{task['after']:.3f}",
            f"{-gain if task['metric'] == 'loss' else gain:+.3f}",
        )
    mean = results["mean"]
    if mean["after"] is not None:
        gain = f"{mean['after'] - mean['before']:+.3f}"
        table.add_section()
        table.add_row("mean", "", "", "", f"{mean['before']:.3f}", f"{mean['after']:.3f}", gain, style="bold")
    console.print(table)
    _show_time(results, console)


def _show_time(results: dict[str, Any], console: Console) -> None:
    console.print(f"{results['steps']} steps in {results['train_seconds']:.0f} s of training", highlight=False)
