"""What a report says about the conflict between tasks' gradients, where `headwater conflict` measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from headwater.report import comparison_figures as figures
from headwater.report.comparison import Comparison
from headwater.report.html import Block, Cell, FigureBlock, Section, Table, Text
from headwater.report.run import Conflicts, Run
from headwater.report.text import change_text, names_text, percent_text, plural

_WHAT = (
    "Cosine between the gradients of every two tasks' losses with respect to the trained adapter's parameters, without "
    "dropout, on {rows} training rows a task. Below 0 a step that helps one task hurts the other."
)


def conflict_sections(run: Run) -> list[Section]:
    """One run's; none where it was not measured."""
    found = run.conflicts
    if found is None or "all" not in found.parts:
        return []
    rows = [[Cell(part), *_numbers([found], part)] for part in found.parts]
    blocks: list[Block] = [
        Text(_WHAT.format(rows=found.rows_per_task)),
        _figure("conflict", "all of the adapter's parameters", [found]),
        Table(["Parameters", "Mean cosine of pairs", "Pairs below 0"], rows),
    ]
    return [Section("conflict", "Do the tasks' gradients conflict", blocks)]


def comparison_conflict_sections(comparison: Comparison) -> list[Section]:
    """Each method's, means over those of its runs that were measured."""
    measured = {
        label: kept
        for label, runs in comparison.runs.items()
        if (kept := [r.conflicts for r in runs if r.conflicts is not None and "all" in r.conflicts.parts])
    }
    if not measured:
        return []
    parts = [part for part in ("all", "A", "B") if any(part in c.parts for found in measured.values() for c in found)]
    rows = [
        [Cell(label, plural(len(found), "run", "runs")), *(cell for part in parts for cell in _numbers(found, part))]
        for label, found in measured.items()
    ]
    columns = ["Method", *(f"{name} ({part})" for part in parts for name in ("Mean cosine", "Pairs below 0"))]
    caption = "Means over runs; all: all parameters of the adapter, A: down-projections, B: up-projections."
    blocks: list[Block] = [Text(_WHAT.format(rows=next(iter(measured.values()))[0].rows_per_task))]
    blocks.append(Table(columns, rows, caption, sortable=True))
    for number, (label, found) in enumerate(measured.items()):
        blocks.append(
            _figure(f"conflict_{number + 1}", f"{label}, mean over {plural(len(found), 'run', 'runs')}", found)
        )
    return [Section("conflict", "Do the tasks' gradients conflict", blocks)]


def _figure(name: str, what: str, found: Sequence[Conflicts]) -> FigureBlock:
    tasks = found[0].tasks
    same = [c for c in found if c.tasks == tasks]
    stacked = np.array([c.parts["all"].cosine for c in same], dtype=float)  # None becomes NaN
    mean = stacked.mean(0)
    matrix: Mapping[str, Mapping[str, float | None]] = {
        row: {t: None if i == j or np.isnan(mean[i, j]) else float(mean[i, j]) for j, t in enumerate(tasks)}
        for i, row in enumerate(tasks)
    }
    draw = lambda w: figures.signed_table(matrix, "cosine", w, turn=False)  # noqa: E731
    return FigureBlock(name, f"Cosine between tasks' gradients: {what}.", f"Matrix of {names_text(tasks)}.", draw)


def means(found: Sequence[Conflicts], part: str) -> tuple[float | None, float | None]:
    """Mean cosine of pairs and share of pairs below 0 for a part of the parameters, over those runs that have both."""
    held = [c.parts[part] for c in found if part in c.parts]
    known = [(p.mean, p.negative) for p in held if p.mean is not None and p.negative is not None]
    if not known:
        return None, None
    cosine, share = np.mean(known, axis=0)
    return float(cosine), float(share)


def _numbers(found: Sequence[Conflicts], part: str) -> list[Cell]:
    cosine, share = means(found, part)
    if cosine is None or share is None:
        return [Cell(""), Cell("")]
    return [Cell(change_text(cosine), sort=cosine), Cell(percent_text(share), sort=share)]
