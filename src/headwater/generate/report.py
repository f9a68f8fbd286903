"""The report of a generator: what it writes, against what training wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import write_page
from ..report.figures import Bar, BarGroup, grouped_bars
from ..report.html import Cell, FigureBlock, Note, Page, Section, Table, Text, render
from ..report.theme import colour

KINDS = {
    "base": "base model",
    "source": "trained adapter",
    "mean_checkpoint": "mean of its checkpoints",
    "generated": "generated",
    "nearest_checkpoint": "nearest trained checkpoint to it",
    "wrong_condition": "generated, wrong task's vector",
    "left_out": "generated, task left out",
}
_FILLS = {"source": "task-1", "mean_checkpoint": "task-2", "generated": "task-3"}


def is_loss(results: dict[str, Any], task: str) -> bool:
    """Whether a task is scored by its loss, in nats: lower is better. Results of before that was noted do not say."""
    return results["extra"].get("metrics", {}).get(task) == "loss"


def mean_of(results: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The mean over tasks of each kind of adapter, and what it is: of the scores, or, where there are none, the losses.

    Returns:
        "mean" or "mean loss", and kind -> mean.
    """
    scores = results["scores"]
    kinds = [kind for kind in KINDS if kind in next(iter(scores.values()))]
    counted = [by for task, by in scores.items() if not is_loss(results, task)]
    name, counted = ("mean", counted) if counted else ("mean loss", list(scores.values()))
    return name, {kind: sum(by[kind] for by in counted) / len(counted) for kind in kinds}


def write_meta_report(folder: Path, results: dict[str, Any]) -> Path:
    """Writes `report.html` and its figure's files into the folder, from `results.json`'s content."""
    return write_page(*render(_page(results)), folder)


def _page(results: dict[str, Any]) -> Page:
    scores, extra = results["scores"], results["extra"]
    name, means = mean_of(results)
    kinds = list(means)
    losses = [task for task in scores if is_loss(results, task)]
    rows = [
        [
            Cell(task, f"{extra['n'][task]} rows" + (", loss" if task in losses else "")),
            *(Cell(f"{by[kind]:.3f}", _interval(extra["intervals"][task][kind])) for kind in kinds),
        ]
        for task, by in scores.items()
    ]
    rows.append([Cell(name), *(Cell(f"{means[kind]:.3f}") for kind in kinds)])
    caption = "Held-out scores, with 95 % intervals."
    if losses:
        caption += " Loss is in nats per token, lower is better"
        caption += "." if len(losses) == len(scores) else "; it is not part of the mean."
    table = Table(["task", *(KINDS[kind] for kind in kinds)], rows, caption, totals=1)
    figures = []
    if len(losses) < len(scores):
        text = "Held-out score of each adapter, per task. The line is what always giving the commonest answer scores."
        shares = [task for task in scores if task not in losses]
        figures.append(_figure("generated-against-trained", text, results, shares))
    if losses:
        text = "Held-out loss of each adapter, per task, in nats per token: shorter is better."
        figures.append(_figure("losses-generated-against-trained", text, results, losses))
    storage = extra["storage_bytes"]
    distances = Table(
        ["generated for", *extra["distance"]],
        [[Cell(task), *(Cell(f"{d:.3f}") for d in by.values())] for task, by in extra["distance"].items()],
        "Mean squared distance in normalised weights to each task's mean checkpoint. Own task: near 0 when learned.",
    )
    size = {name: _size(value) for name, value in storage.items()}
    kept = (
        f"The generator takes {size['generator']}, one adapter {size['adapter']}, one adapter per task "
        f"{size['one_adapter_per_task']}, all collected checkpoints {size['all_checkpoints']}. The generator is "
        f"smaller than one adapter per task from {storage['tasks_to_break_even']:.0f} tasks on, "
        "if it need not grow for them."
    )
    return Page(
        "generated adapters",
        "Does a generated adapter do what the trained one does?",
        f"{len(scores)} tasks on {results['base_model']}, seed {results['seed']}.",
        [
            (KINDS[kind], f"{means[kind]:.3f}", "mean score" if name == "mean" else name)
            for kind in kinds
            if kind in ("base", "source", "generated")
        ],
        [
            Section("scores", "Scores", [table, *figures, *_notes(means, lower_is_better=name != "mean")]),
            Section("weights", "Weights", [distances]),
            Section("storage", "Storage", [Text(kept)]),
        ],
    )


def _figure(name: str, caption: str, results: dict[str, Any], tasks: Sequence[str]) -> FigureBlock:
    """Bars of each kind of adapter, a block for each task; from 0 to 1, or to the largest of losses."""
    chosen, extra = {task: results["scores"][task] for task in tasks}, results["extra"]
    limit = 1.0
    if is_loss(results, tasks[0]):
        ends = [end for task in tasks for pair in extra["intervals"][task].values() for end in pair or ()]
        limit = max([*ends, *(value for by in chosen.values() for value in by.values())]) or 1.0

    def draw(width: float) -> Any:
        groups = [
            BarGroup(
                task,
                colour("ink"),
                [
                    Bar(KINDS[kind], by[kind], colour(_FILLS.get(kind, "muted")), _pair(extra["intervals"][task][kind]))
                    for kind in KINDS
                    if kind in by
                ],
                mark=extra["majority"][task],
                mark_note="commonest answer" if extra["majority"][task] is not None else "",
            )
            for task, by in chosen.items()
        ]
        return grouped_bars(groups, width, limit=limit)

    return FigureBlock(name, caption, "Bars of the scores in the table above.", draw)


def _notes(means: dict[str, float], *, lower_is_better: bool) -> list[Note]:
    notes = []
    if lower_is_better:
        means = {kind: -mean for kind, mean in means.items()}
    if means["wrong_condition"] >= means["generated"]:
        notes.append(Note("Adapters made with another task's vector score no worse: the condition does nothing here."))
    if means["nearest_checkpoint"] >= means["generated"]:
        notes.append(Note("The trained checkpoint nearest to what is generated scores no worse: keeping it would do."))
    if "left_out" in means and means["left_out"] <= means["base"]:
        notes.append(Note("For tasks that the generator never saw, what it writes does not beat the base model."))
    return notes


def _size(count: float) -> str:
    """Bytes as `0.2 MiB`, few of them as `12.5 KiB`."""
    return f"{count / 2**20:.1f} MiB" if count >= 0.1 * 2**20 else f"{count / 2**10:.1f} KiB"


def _pair(interval: list[float] | None) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval else None


def _interval(interval: list[float] | None) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
