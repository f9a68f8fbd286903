"""What a comparison's report draws over steps, from the histories of its runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from headwater.report import comparison_figures as figures
from headwater.report.comparison import Comparison
from headwater.report.figures import running_mean, smoothing_window
from headwater.report.html import Block, FigureBlock, Note, Section
from headwater.report.run import Run, finite
from headwater.report.text import names_text
from headwater.report.theme import task_fills


def curves_section(comparison: Comparison) -> Section:
    """Training loss and held-out scores over steps."""
    fills = task_fills(comparison.labels)
    blocks: list[Block] = []
    losses = [panel(comparison, "all tasks", _loss, bottom=0.0)]
    if len(comparison.tasks) > 1:
        losses += [panel(comparison, t, partial(_task_loss, task=t), bottom=0.0) for t in comparison.tasks]
    losses = [p for p in losses if p.lines]
    scores = [panel(comparison, task, partial(_held_out, task=task)) for task in comparison.tasks]
    scores = [p for p in scores if any(len(line.steps) > 2 for line in p.lines)]
    if losses:
        window = max(smoothing_window(len(line.steps)) for p in losses for line in p.lines)
        smooth = f" and up to {window} neighbouring points" if window > 1 else ""
        caption = f"Training loss on completions, in nats per token, mean over seeds{smooth}."
        alt = f"Training loss over steps of {names_text(comparison.labels)}."
        blocks.append(FigureBlock("training_loss", caption, alt, lambda w: figures.method_curves(losses, fills, w)))
    if scores:
        caption = (
            "Held-out scores during training, mean over seeds. The ends are on all test rows, points between them on "
            "fewer, so a step up or down at an end may be the rows."
        )
        alt = f"Held-out scores over steps of {names_text(comparison.labels)}."
        blocks.append(FigureBlock("evaluation", caption, alt, lambda w: figures.method_curves(scores, fills, w)))
    if not blocks:
        blocks.append(
            Note(
                "The folders of the runs are not here, or hold no history: runs shorter than logging_steps log nothing."
            )
        )
    return Section("curves", "Learning curves", blocks)


def panel(
    comparison: Comparison,
    title: str,
    read: Callable[[Run], dict[int, float | None]],
    bottom: float | None = None,
    *,
    smooth: bool = True,
) -> figures.Panel:
    """A line per method: the mean over its runs at every step that all of them have, and over neighbouring ones."""
    lines = []
    for label, runs in comparison.runs.items():
        series = [{step: v for step, value in read(run).items() if (v := finite(value)) is not None} for run in runs]
        steps = sorted(set.intersection(*map(set, series))) if series else []
        if len(steps) > 1:
            means = [sum(s[step] for s in series) / len(series) for step in steps]
            lines.append(
                figures.Line(label, steps, running_mean(means, smoothing_window(len(means))) if smooth else means)
            )
    return figures.Panel(title, lines, bottom=bottom)


def _loss(run: Run) -> dict[int, float | None]:
    return {r.step: r.loss for r in run.train}


def _task_loss(run: Run, task: str) -> dict[int, float | None]:
    return {r.step: r.task_losses.get(task) for r in run.train}


def _held_out(run: Run, task: str) -> dict[int, float | None]:
    return {e.step: e.tasks[task].value for e in run.evals if task in e.tasks}
