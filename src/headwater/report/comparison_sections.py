"""What a comparison's report says: from the values of its folder to sections of text, tables and figures."""

from __future__ import annotations

from collections.abc import Callable

from headwater.report import comparison_figures as figures
from headwater.report.comparison import Comparison, Summary
from headwater.report.comparison_curves import curves_section
from headwater.report.comparison_heads import heads_sections
from headwater.report.comparison_interference import interference_sections
from headwater.report.conflicts import comparison_conflict_sections
from headwater.report.figures import Bar, BarGroup, grouped_bars
from headwater.report.html import Block, Cell, Facts, FigureBlock, Note, Page, Section, Table, Text
from headwater.report.run import finite
from headwater.report.text import (
    change_text,
    count_text,
    duration_text,
    interval_text,
    memory_text,
    names_text,
    plural,
    score_text,
    short_count_text,
    value_text,
)
from headwater.report.theme import colour, task_colour_names, task_fills


def build_comparison_page(comparison: Comparison) -> Page:
    """The report of a comparison."""
    sections = [
        _scores(comparison),
        _sizes(comparison),
        _tasks(comparison),
        *interference_sections(comparison),
        *comparison_conflict_sections(comparison),
        curves_section(comparison),
        *heads_sections(comparison),
        _choices(comparison),
        _settings(comparison),
    ]
    return Page(
        kicker="headwater comparison",
        title=f"{names_text(comparison.labels, 3)} compared",
        lead=_lead(comparison),
        tiles=_tiles(comparison),
        sections=[section for section in sections if section is not None],
        footer="Every figure is also in the folder figures beside this page, as SVG and as PNG.",
    )


def _lead(comparison: Comparison) -> str:
    first, *others = comparison.content.summary
    if not others:
        return f"{first.method} on {plural(len(comparison.tasks), 'task', 'tasks')}, with nothing to compare it with."
    if first.n < 2:
        return "One seed does not tell differences between methods from chance; what follows is one run of each."
    better = [e.method for e in others if e.paired_ci95 and e.paired_ci95[0] > 0]
    worse = [e.method for e in others if e.paired_ci95 and e.paired_ci95[1] < 0]
    compared = [e.method for e in others if e.paired_difference is not None]
    unclear = [name for name in compared if name not in (*better, *worse)]
    parts = []
    for names, said in ((better, "better than"), (worse, "worse than"), (unclear, "not clearly different from")):
        if names:
            parts.append(f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {said} {first.method}.")
    if not parts:
        return "No task has a score; losses are compared task by task."
    return f"{' '.join(parts)} Judged by the 95 % intervals of the differences over {first.n} seeds."


def _listed(names: list[str]) -> str:
    if len(names) == 1 or len(names) > 8:
        return names_text(names, 8)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    summary, extra = comparison.content.summary, comparison.content.extra
    tiles = [
        ("Methods", str(len(summary)), plural(len(comparison.tasks), "task", "tasks")),
        ("Seeds", str(summary[0].n), ", ".join(map(str, extra.seeds))),
    ]
    if extra.budget is not None:
        far = max((abs(m.deviation or 0) for m in extra.methods), default=0)
        tiles.append(("Trained parameters", short_count_text(extra.budget), f"to within {far:.1%} for all"))
    scored = [e for e in summary if e.mean is not None]
    if scored:
        best = max(scored, key=lambda e: e.mean or 0)
        before = best.extra.before
        small = best.method if before is None else f"{best.method}; base model {before:.3f}"
        tiles.append(("Highest mean", score_text(best.mean), small))
    return tiles


def _scores(comparison: Comparison) -> Section:
    summary = comparison.content.summary
    first, n = summary[0].method, summary[0].n
    colours, fills = task_colour_names(comparison.labels), task_fills(comparison.labels)
    columns = ["Method", "Parameters", "Mean score", f"Minus {first}", "Learning rate", "Step time"]
    rows = [_row(comparison, entry, colours[entry.method]) for entry in summary]
    memory: list[tuple[str, list[float | None]]] = [
        ("Memory", [e.extra.peak_memory_bytes for e in summary]),
        ("Activations", [e.extra.activation_bytes for e in summary]),
    ]
    for name, sizes in memory:
        if any(sizes):
            columns.append(name)
            for row, size in zip(rows, sizes, strict=True):
                row.append(Cell("" if size is None else memory_text(size), sort=size))
    caption = (
        f"Mean over tasks of the scores on test rows, and over {plural(n, 'seed', 'seeds')}. Under each number its "
        "95 % interval, by Student's t over seeds; of a difference, by t over the differences seed by seed. The test "
        "rows are the same in all runs, so their own chance is not in the intervals."
    )
    if "Activations" in columns:
        caption += " Activations: what the forward of the first batch keeps for its backward."
    blocks: list[Block] = []
    if n < 2:
        blocks.append(Note("One seed: there is no interval over seeds, and differences of a few points may be chance."))
    blocks.append(Table(columns, rows, caption, sortable=True))
    values = {label: [finite(r.mean.after) for r in comparison.results[label]] for label in comparison.labels}
    means = [
        figures.Spread(e.method, fills[e.method], [v for v in values[e.method] if v is not None], e.mean, e.ci95)
        for e in summary
    ]
    apart = [
        figures.Spread(
            e.method,
            fills[e.method],
            [v - w for v, w in zip(values[e.method], values[first], strict=False) if v is not None and w is not None],
            e.paired_difference,
            e.paired_ci95,
        )
        for e in summary[1:]
    ]
    drawn = [figures.SpreadBlock("Mean score", means)]
    if apart:
        none = figures.Spread(first, fills[first], [], None)
        drawn.append(figures.SpreadBlock(f"Difference to {first}", [none, *apart], zero=True, sign="+"))
    key = (
        "Small points: single seeds. Large points: means. Lines: 95 % intervals over seeds; an arrow at the edge says "
        "that one goes on beyond the scale."
    )
    said = "; ".join(f"{e.method} {score_text(e.mean)}" for e in summary)
    blocks.append(FigureBlock("comparison", key, f"Mean scores: {said}.", lambda w: figures.spreads(drawn, w)))
    return Section("scores", "Scores", blocks)


def _row(comparison: Comparison, entry: Summary, colour_name: str) -> list[Cell]:
    about, extra = comparison.about(entry.method), entry.extra
    size = "" if about.solved is None else f"{about.solved} {about.method.get(about.solved)}"
    off = f"{about.deviation:+.1%} off".replace("-", "−") if about.deviation else ""
    named = str(about.method.get("name", ""))
    difference = "" if entry.paired_difference is None else change_text(entry.paired_difference)
    step = "" if extra.seconds_per_step is None else f"{extra.seconds_per_step:.3g} s"
    return [
        Cell(entry.method, named if named != entry.method else "", colour_name),
        Cell(
            count_text(entry.trainable_parameters),
            ", ".join(filter(None, (size, off))),
            sort=entry.trainable_parameters,
        ),
        Cell(score_text(entry.mean), interval_text(entry.ci95), sort=entry.mean),
        Cell(difference, interval_text(entry.paired_ci95, sign="+"), sort=entry.paired_difference),
        Cell("" if about.learning_rate is None else f"{about.learning_rate:g}", sort=about.learning_rate),
        Cell(step, sort=extra.seconds_per_step),
    ]


def _sizes(comparison: Comparison) -> Section | None:
    fills = task_fills(comparison.labels)
    sizes = [
        figures.Size(e.method, fills[e.method], e.trainable_parameters, e.mean, e.ci95)
        for e in comparison.content.summary
        if e.mean is not None
    ]
    if not sizes:
        return None
    caption = "Mean score over seeds against trainable parameters, with 95 % intervals over seeds, cut at the edges."
    said = "; ".join(f"{s.label} {count_text(s.parameters)}, {score_text(s.mean)}" for s in sizes)
    draw = lambda w: figures.parameters_against_score(sizes, w)  # noqa: E731
    alt = f"Points of trainable parameters and mean score: {said}."
    return Section("size", "Parameters against score", [FigureBlock("parameters_score", caption, alt, draw)])


def _tasks(comparison: Comparison) -> Section:
    summary, fills = comparison.content.summary, task_fills(comparison.labels)
    first = summary[0]
    shares = [task for task in comparison.tasks if first.extra.tasks[task].metric != "loss"]
    losses = [task for task in comparison.tasks if task not in shares]
    blocks: list[Block] = []
    apart = {
        e.method: {task: e.extra.tasks[task].paired_difference for task in shares if task in e.extra.tasks}
        for e in summary[1:]
    }
    if len(shares) > 1 and apart:
        caption = (
            f"Mean over seeds of each method's score minus that of {first.method}, task by task. Small differences are "
            "chance: the intervals are in comparison.json."
        )
        said = f"Differences of {names_text(list(apart))} to {first.method} on {names_text(shares)}."
        draw = lambda w: figures.differences(apart, first.method, w)  # noqa: E731
        blocks.append(FigureBlock("task_differences", caption, said, draw))
    for name, tasks, what in (("task_scores", shares, "Score"), ("task_losses", losses, "Loss in nats per token")):
        if tasks:
            groups, limit = _bar_groups(summary, tasks, fills)
            caption = (
                f"{what} on test rows, mean over seeds, with 95 % intervals over seeds. Upright line: the base model."
                f"{' Shorter is better.' if tasks is losses else ''}"
            )
            alt = f"Bars of each method's {what.lower()} on {names_text(tasks)}."
            blocks.append(FigureBlock(name, caption, alt, _bars(groups, limit if tasks is losses else 1.0)))
    return Section("tasks", "Task by task", blocks)


def _bars(groups: list[BarGroup], limit: float) -> Callable:
    return lambda w: grouped_bars(groups, w, limit=limit)


def _bar_groups(summary: list[Summary], tasks: list[str], fills: dict[str, str]) -> tuple[list[BarGroup], float]:
    groups, ends = [], [1e-9]
    for task in tasks:
        of_task = {e.method: e.extra.tasks[task] for e in summary if task in e.extra.tasks}
        bars = [Bar(label, finite(t.mean), fills[label], t.ci95) for label, t in of_task.items()]
        before = finite(next(iter(of_task.values())).before)
        ends += [v for b in bars for v in (b.value or 0.0, b.interval[1] if b.interval else 0.0)] + [before or 0.0]
        groups.append(
            BarGroup(task, colour("muted"), bars, mark=before, mark_note="" if before is None else f"base {before:.3f}")
        )
    return groups, max(ends) * 1.03


def _choices(comparison: Comparison) -> Section | None:
    chosen = comparison.content.extra.learning_rate
    if not chosen:
        return None
    rates = sorted({rate for choice in chosen.values() for rate in choice.scores}, key=float)
    rows = []
    for label, choice in chosen.items():
        taken = f"{choice.chosen:g}" if choice.chosen is not None else ""
        cells = [
            Cell(
                "diverged" if choice.scores.get(rate, 0.0) is None else score_text(choice.scores.get(rate)),
                "taken" if rate == taken else "",
                sort=choice.scores.get(rate),
            )
            for rate in rates
        ]
        rows.append([Cell(label), *cells])
    seed = next(iter(chosen.values())).seed
    caption = f"Mean score on validation rows after training with seed {seed}; no test row is among them."
    return Section("learning-rates", "Choice of learning rates", [Table(["Method", *rates], rows, caption)])


def _settings(comparison: Comparison) -> Section:
    extra = comparison.content.extra
    runs = [run for runs in comparison.results.values() for run in runs]
    pairs = [
        ("Base model", runs[0].base_model if runs else "–"),
        ("Steps", names_text(sorted({count_text(r.steps) for r in runs}))),
        ("Matched", "nothing" if extra.budget is None else f"{extra.match}, to {extra.budget:,} parameters"),
    ]
    seconds = [r.train_seconds for r in runs if r.train_seconds is not None]
    if seconds:
        pairs.append(("Training time", f"{duration_text(sum(seconds))} in {plural(len(runs), 'run', 'runs')}"))
    if runs and runs[0].extra.versions:
        pairs.append(("Versions", ", ".join(f"{name} {v}" for name, v in runs[0].extra.versions.items())))
    methods = []
    for about in extra.methods:
        fields = [
            f"{key} {value_text(v)}" for key, v in about.method.items() if key != "name" and v not in (None, [], {})
        ]
        if about.align:
            fields.append(f"align {about.align.get('kind')} {about.align.get('weight')}")
        methods.append([Cell(about.label, str(about.method.get("name", ""))), Cell("; ".join(fields))])
    text = "Fields that are not named have their method's default. Each run's folder holds its whole config.yaml."
    table = Table(["Method", "Fields"], methods, left=True)
    return Section("settings", "What was compared", [Facts(pairs), table, Text(text)])
