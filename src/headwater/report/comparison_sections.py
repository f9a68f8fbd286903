"""What a comparison's report says: from the values of its folder to sections of text, tables and figures."""

from __future__ import annotations

from headwater.report import comparison_figures as figures
from headwater.report.comparison import Comparison, Summary
from headwater.report.html import Block, Cell, FigureBlock, Note, Page, Section, Table
from headwater.report.text import change_text, count_text, interval_text, names_text, plural, score_text
from headwater.report.theme import task_colour_names, task_fills


def build_comparison_page(comparison: Comparison) -> Page:
    """The report of a comparison."""
    labels = comparison.labels
    return Page(
        kicker="headwater comparison",
        title=f"{names_text(labels)} compared",
        lead=_lead(comparison),
        tiles=[],
        sections=[_scores(comparison)],
        footer="Every figure is also in the folder figures beside this page, as SVG and as PNG.",
    )


def _lead(comparison: Comparison) -> str:
    first, *others = comparison.content.summary
    n = first.n
    start = f"{plural(len(comparison.labels), 'method', 'methods')} on {plural(len(comparison.tasks), 'task', 'tasks')}"
    parts = [f"{start}, {plural(n, 'seed', 'seeds')} each."]
    if n < 2:
        return f"{parts[0]} One seed does not tell differences between methods from chance."
    better = [e.method for e in others if e.paired_ci95 and e.paired_ci95[0] > 0]
    worse = [e.method for e in others if e.paired_ci95 and e.paired_ci95[1] < 0]
    unclear = [e.method for e in others if e.paired_ci95 and e.paired_ci95[0] <= 0 <= e.paired_ci95[1]]
    for names, said in ((better, "better than"), (worse, "worse than"), (unclear, "not told apart from")):
        if names:
            parts.append(f"{names_text(names, 8)} {'is' if len(names) == 1 else 'are'} {said} {first.method}.")
    return " ".join(parts)


def _scores(comparison: Comparison) -> Section:
    summary = comparison.content.summary
    first = summary[0].method
    colours, fills = task_colour_names(comparison.labels), task_fills(comparison.labels)
    rows = [_row(comparison, entry, colours[entry.method]) for entry in summary]
    n = summary[0].n
    caption = (
        f"Mean over tasks of the scores on test rows, and over {plural(n, 'seed', 'seeds')}. Under each number its "
        "95 % interval, by Student's t over seeds; of a difference, by t over the differences seed by seed. The test "
        "rows are the same in all runs, so their own chance is not in the intervals."
    )
    blocks: list[Block] = []
    if n < 2:
        blocks.append(
            Note("One seed: there is no interval over seeds, and a difference of a few points may be chance.")
        )
    columns = ["Method", "Trained parameters", "Mean score", f"Minus {first}", "Learning rate"]
    blocks.append(Table(columns, rows, caption))
    values = {label: [r.mean.after for r in comparison.results[label]] for label in comparison.labels}
    means = [
        figures.Spread(e.method, fills[e.method], [v for v in values[e.method] if v is not None], e.mean, e.ci95)
        for e in summary
    ]
    differences = [
        figures.Spread(
            e.method,
            fills[e.method],
            [v - w for v, w in zip(values[e.method], values[first], strict=True) if v is not None and w is not None],
            e.paired_difference if e.method != first else 0.0,
            e.paired_ci95,
        )
        for e in summary
    ]
    drawn = [
        figures.SpreadBlock("Mean score", means),
        figures.SpreadBlock(f"Difference to {first}", differences, zero=True, sign="+"),
    ]
    key = (
        "Pale points: single seeds. Strong points: means. Lines: 95 % intervals over seeds; an arrow at the edge says "
        "that one goes on beyond the scale."
    )
    said = "; ".join(f"{e.method} {score_text(e.mean)}" for e in summary)
    blocks.append(FigureBlock("comparison", key, f"Mean scores: {said}.", lambda w: figures.spreads(drawn, w)))
    return Section("scores", "Scores", blocks)


def _row(comparison: Comparison, entry: Summary, colour_name: str) -> list[Cell]:
    about = comparison.about(entry.method)
    size = "" if about.solved is None else f"{about.solved} {about.method.get(about.solved)}"
    off = "" if about.deviation is None else f"{about.deviation:+.1%} off".replace("-", "−")
    named = str(about.method.get("name", ""))
    first = entry.paired_difference is None
    return [
        Cell(entry.method, named if named != entry.method else "", colour_name),
        Cell(count_text(entry.trainable_parameters), ", ".join(filter(None, (size, off)))),
        Cell(score_text(entry.mean), interval_text(entry.ci95)),
        Cell("" if first else change_text(entry.paired_difference), interval_text(entry.paired_ci95)),
        Cell("" if about.learning_rate is None else f"{about.learning_rate:g}"),
    ]
