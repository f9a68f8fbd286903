"""What a comparison says about interference: one adapter for all tasks against one for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from headwater.evaluation.intervals import t_interval
from headwater.report import comparison_figures as figures
from headwater.report.comparison import Comparison
from headwater.report.html import Block, Cell, FigureBlock, Section, Table, Text
from headwater.report.run import Interval, Results, finite
from headwater.report.text import change_text, interval_text, names_text, plural, score_text


@dataclass(frozen=True)
class Gap:
    """One task's score with the shared adapter and with one of its own.

    Args:
        shared, single: means over seeds.
        values: shared minus single, seed by seed.
        ci95: of the mean of `values`, Student's t over seeds; None with one seed.
    """

    shared: float
    single: float
    values: list[float]
    ci95: Interval | None

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


def trained_on(comparison: Comparison, label: str) -> list[str]:
    """The tasks that a method's runs drew training rows of."""
    runs = comparison.results[label]
    return [t for t in comparison.tasks if any(_rows(run, t) for run in runs)]


def _rows(run: Results, task: str) -> int:
    share = run.extra.realised_shares.get(task)
    return (share and share.rows) or 0


def single_arms(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Label of each adapter that is shared by tasks -> task -> label of the same method trained on that task alone.

    The same method is one with equal fields and the same alignment loss; what it is called does not matter. Empty
    where no method was trained on one task alone.
    """
    drawn = {label: trained_on(comparison, label) for label in comparison.labels}
    single = {(_fields(comparison, label), tasks[0]): label for label, tasks in drawn.items() if len(tasks) == 1}
    arms = {
        label: {t: single[fields, t] for t in tasks if (fields, t) in single}
        for label, tasks in drawn.items()
        if len(tasks) > 1 and (fields := _fields(comparison, label))
    }
    return {label: own for label, own in arms.items() if own}


def _fields(comparison: Comparison, label: str) -> str:
    about = comparison.about(label)
    return json.dumps([about.method, about.align], sort_keys=True)


def seesaw(comparison: Comparison) -> dict[str, dict[str, Gap]]:
    """Shared adapter -> task -> its score minus that of the adapter for this task alone, seed by seed.

    Tasks that are measured by a loss are left out.
    """
    table: dict[str, dict[str, Gap]] = {}
    for label, arms in single_arms(comparison).items():
        for task, arm in arms.items():
            pairs = [
                (shared.tasks[task].after, own.tasks[task].after)
                for shared, own in zip(comparison.results[label], comparison.results[arm], strict=False)
                if shared.seed == own.seed and task in shared.tasks and shared.tasks[task].metric != "loss"
            ]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            if known:
                values = [a - b for a, b in known]
                shared_mean, single_mean = (sum(column) / len(known) for column in zip(*known, strict=True))
                ends = t_interval(values, (-1.0, 1.0))
                table.setdefault(label, {})[task] = Gap(shared_mean, single_mean, values, ends)
    return table


def transfer(comparison: Comparison) -> dict[str, dict[str, dict[str, float | None]]]:
    """Shared adapter -> task trained on alone -> task scored -> mean score over seeds minus the base model's."""
    tasks = [t for t in comparison.tasks if comparison.content.summary[0].extra.tasks[t].metric != "loss"]
    return {
        label: {task: {t: _gain(comparison.results[arm], t) for t in tasks} for task, arm in arms.items()}
        for label, arms in single_arms(comparison).items()
    }


def _gain(runs: list[Results], task: str) -> float | None:
    gains = [
        run.tasks[task].after - run.tasks[task].before  # type: ignore[operator]
        for run in runs
        if task in run.tasks and None not in (run.tasks[task].after, run.tasks[task].before)
    ]
    return finite(sum(gains) / len(gains)) if gains else None


def interference_sections(comparison: Comparison) -> list[Section]:
    """The gap of each task and transfer between tasks; none where no method was trained on one task alone."""
    gaps = seesaw(comparison)
    return [_section(comparison, gaps)] if gaps else []


def _section(comparison: Comparison, gaps: Mapping[str, Mapping[str, Gap]]) -> Section:
    tasks = [task for task in comparison.tasks if any(task in row for row in gaps.values())]
    matrix = {label: {t: row[t].mean if t in row else None for t in tasks} for label, row in gaps.items()}
    n = comparison.content.summary[0].n
    text = (
        "Each task's score with the adapter that all tasks share, minus that with an adapter of the same method for "
        "this task alone. Below 0 sharing costs the task something, above 0 other tasks help it. Fair where both saw "
        "as many rows of the task."
    )
    rows = [
        [
            Cell(label, task),
            Cell(score_text(gap.shared)),
            Cell(score_text(gap.single)),
            Cell(change_text(gap.mean), interval_text(gap.ci95, sign="+"), sort=gap.mean),
        ]
        for label, row in gaps.items()
        for task, gap in row.items()
    ]
    caption = f"Means over {plural(n, 'seed', 'seeds')}; 95 % intervals of the differences, Student's t over seeds."
    said = f"Differences of {names_text(list(matrix))} to adapters for one task, on {names_text(tasks)}."
    blocks: list[Block] = [
        Text(text),
        FigureBlock(
            "seesaw",
            "Shared minus single-task adapter, mean over seeds, task by task; the intervals are in the table below.",
            said,
            lambda w: figures.differences(matrix, "its own adapter", w),
        ),
        Table(["Method", "Shared", "Alone", "Difference"], rows, caption),
    ]
    for number, (label, gains) in enumerate(transfer(comparison).items()):
        caption = (
            f"Transfer with {label}: trained on one task (rows), scored on each (columns), minus the base model; "
            "mean over seeds."
        )
        alt = f"Matrix of the change on each task after training {label} on one task."
        draw = lambda w, gains=gains: figures.differences(gains, "the base model", w, turn=False)  # noqa: E731
        blocks.append(FigureBlock(f"transfer_{number + 1}", caption, alt, draw))
    return Section("interference", "What sharing costs each task", blocks)
