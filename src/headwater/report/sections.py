"""What a run's report says: from the values of a run folder to sections of text, tables and figures."""

from __future__ import annotations

from typing import Any

from headwater.report import figures
from headwater.report.conflicts import conflict_sections
from headwater.report.head_sections import routing_section, similarity_section
from headwater.report.html import Block, Cell, Code, Facts, FigureBlock, Note, Page, Section, Table, Text
from headwater.report.run import Interval, RealisedShare, Run, Score, finite, score_interval
from headwater.report.text import (
    change_text,
    count_text,
    duration_text,
    interval_text,
    missing_text,
    names_text,
    percent_text,
    plural,
    score_text,
    short_count_text,
    value_text,
)
from headwater.report.theme import colour, task_colour_names, task_fills

_METRICS = {
    "choice_accuracy": "choice accuracy",
    "exact_match": "exact match",
    "final_number": "final number",
    "loss": "loss",
}


def build_page(run: Run) -> Page:
    """The report of one run."""
    results = run.results
    base = results.base_model.rstrip("/").rpartition("/")[2] if results else ""
    method = (results.method if results else "") or str(_method(run).get("name", ""))
    sections = [
        _what_was_run(run),
        _scores(run),
        _training(run),
        _evaluation(run),
        similarity_section(run),
        routing_section(run),
        *conflict_sections(run),
        _mixture(run),
        _settings(run),
    ]
    drawn = any(isinstance(block, FigureBlock) for section in sections for block in section.blocks)
    return Page(
        kicker="headwater run report",
        title=f"{method} on {base}" if method and base else method or run.folder.resolve().name,
        lead=_lead(run),
        tiles=_tiles(run),
        sections=sections,
        footer="Every figure is also in the folder figures beside this page, as SVG and as PNG." if drawn else "",
    )


def _method(run: Run) -> dict[str, Any]:
    method = run.config.get("method")
    return method if isinstance(method, dict) else {}


def _lead(run: Run) -> str:
    scores = [s for s in run.scores if not s.is_loss]
    if run.results is None:
        return "This run has no results; what it left behind is shown below."
    parts = []
    mean = run.results.mean
    before, after = finite(mean.before), finite(mean.after)
    if before is not None and after is not None:
        which = f"score of {scores[0].task}" if len(scores) == 1 else f"mean held-out score over {len(scores)} tasks"
        verb = "rose" if after > before else "fell"
        moved = f"{verb} by {abs(after - before):.3f}, from {before:.3f} to" if after != before else "stayed at"
        parts.append(f"The {which} {moved} {after:.3f}.")
    better = [s for s in scores if s.clear and (s.change or 0) > 0]
    worse = [s.task for s in scores if s.clear and (s.change or 0) < 0]
    if len(scores) > 1:
        how_many = "Every task" if len(better) == len(scores) else f"{len(better)} of {len(scores)} tasks"
        parts.append(f"{how_many} improved so clearly that the 95 % intervals before and after do not overlap.")
    if worse:
        parts.append(f"Clearly worse: {names_text(worse)}.")
    flat = [s.task for s in scores if _not_above_majority(s)]
    if flat:
        parts.append(f"Not clearly above the majority class: {names_text(flat)}.")
    return " ".join(parts) or "No task of this run has a score."


def _not_above_majority(score: Score) -> bool:
    return score.majority is not None and score.after_interval is not None and score.after_interval[0] <= score.majority


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    results = run.results
    if results is None:
        return []
    tiles = []
    before, after = finite(results.mean.before), finite(results.mean.after)
    if after is not None:
        small = "" if before is None else f"{before:.3f} before, {change_text(after - before)}"
        tiles.append(("Mean score", f"{after:.3f}", small))
    count = results.trainable_parameters
    if count is not None:
        tiles.append(("Trained parameters", short_count_text(count), count_text(count)))
    if results.steps is not None:
        seed = "" if results.seed is None else f"seed {results.seed}"
        tiles.append(("Optimiser steps", count_text(results.steps), seed))
    seconds, speed = finite(results.train_seconds), finite(results.tokens_per_second)
    if seconds is not None:
        small = "" if speed is None else f"{speed:,.0f} tokens a second"
        tiles.append(("Training time", duration_text(seconds), small))
    return tiles


def _what_was_run(run: Run) -> Section:
    blocks: list[Block] = []
    pairs: list[tuple[str, str]] = []
    results = run.results
    if results is None:
        blocks.append(Note(missing_text(run, "results.json", "the run")))
    else:
        pairs += [("Method", results.method or "–"), ("Base model", results.base_model or "–")]
    settings = _method(run).items()
    pairs += [(str(key), value_text(v)) for key, v in settings if key != "name" and v not in (None, [], {}, "")]
    if results is not None and results.extra.versions:
        versions = ", ".join(f"{name} {version}" for name, version in results.extra.versions.items())
        pairs.append(("Versions", versions))
    if pairs:
        blocks.append(Facts(pairs))
    return Section("run", "What was run", blocks)


def _scores(run: Run) -> Section:
    anchor, title = "scores", "Before and after"
    scores = run.scores
    if run.results is None:
        return Section(anchor, title, [Note(missing_text(run, "results.json", "any task"))])
    if not scores:
        return Section(anchor, title, [Note("No task has test rows, so nothing was scored.")])
    names = task_colour_names(run.tasks)
    rows = [_score_row(s, names[s.task]) for s in scores]
    before, after = finite(run.results.mean.before), finite(run.results.mean.after)
    totals = 0
    if len(scores) > 1 and (before is not None or after is not None):
        change = None if before is None or after is None else after - before
        counted = plural(sum(not s.is_loss for s in scores), "task", "tasks")
        numbers = [score_text(before), score_text(after), change_text(change)]
        rows.append([Cell("Mean", f"of {counted}"), Cell(""), *map(Cell, numbers), Cell("")])
        totals = 1
    caption = (
        "Held-out rows, before and after training. Under each score its 95 % interval: how far it could be off, given "
        "n rows. Majority class: what always giving the most frequent answer would score."
    )
    losses = [s for s in scores if s.is_loss]
    shares = [s for s in scores if not s.is_loss]
    if losses:
        caption += " Loss is in nats per token, lower is better; it is not part of the mean."
    blocks: list[Block] = []
    broken = [s.task for s in scores if s.before is None or s.after is None]
    if broken:
        blocks.append(Note(f"Without a finite score before or after training: {names_text(broken)}."))
    blocks.append(Table(["Task", "n", "Before", "After", "Change", "Majority class"], rows, caption, totals))
    fills = task_fills(run.tasks)
    if shares:
        key = "Grey before, coloured after training. Whiskers: 95 % intervals. Upright line: the majority class."
        blocks.append(_score_figure("scores", key, shares, fills, 1.0))
    if losses:
        key = "Loss before and after training, in nats per token: shorter is better. Whiskers: 95 % intervals."
        ends = [v for s in losses for v in (s.before, s.after) if v is not None]
        ends += [i[1] for s in losses for i in (s.before_interval, s.after_interval) if i is not None]
        blocks.append(_score_figure("losses", key, losses, fills, max(ends, default=1.0) * 1.03 or 1.0))
    return Section(anchor, title, blocks)


def _score_row(score: Score, colour_name: str) -> list[Cell]:
    return [
        Cell(score.task, _METRICS.get(score.metric, score.metric), colour_name),
        Cell(count_text(score.n)),
        Cell(score_text(score.before), interval_text(score.before_interval)),
        Cell(score_text(score.after), interval_text(score.after_interval)),
        Cell(change_text(score.change), "intervals overlap" if score.clear is False else ""),
        Cell(
            "" if score.majority is None else score_text(score.majority),
            "not clearly above" if _not_above_majority(score) else "",
        ),
    ]


def _score_figure(name: str, caption: str, scores: list[Score], fills: dict[str, str], limit: float) -> FigureBlock:
    groups = [
        figures.BarGroup(
            title=s.task,
            fill=fills[s.task],
            bars=[
                figures.Bar("before", s.before, colour("before"), s.before_interval),
                figures.Bar("after", s.after, fills[s.task], s.after_interval),
            ],
            note=f"n = {s.n:,}",
            mark=s.majority,
            mark_note="" if s.majority is None else f"majority {s.majority:.3f}",
        )
        for s in scores
    ]
    said = "; ".join(f"{s.task} {score_text(s.before)} to {score_text(s.after)}" for s in scores)
    alt = f"Bars before and after training: {said}."
    return FigureBlock(name, caption, alt, lambda w: figures.grouped_bars(groups, w, limit=limit))


def _training(run: Run) -> Section:
    anchor, title = "training", "Training loss"
    fills = task_fills(run.tasks)
    curves = [
        figures.Curve(task, fills[task], [r.step for r in rows], [r.task_losses[task] for r in rows])
        for task in run.tasks
        if (rows := [r for r in run.train if task in r.task_losses])
    ]
    if run.train and len(curves) != 1:
        whole = figures.Curve("all tasks", colour("ink"), [r.step for r in run.train], [r.loss for r in run.train])
        curves.insert(0, whole)
    if not curves:
        return Section(anchor, title, [Note(missing_text(run, "history.jsonl", "the training loss"))])
    blocks: list[Block] = []
    if "history.jsonl" in run.notes:
        blocks.append(Note(run.notes["history.jsonl"]))
    lost = [c.title for c in curves if any(finite(v) is None for v in c.values)]
    if lost:
        blocks.append(Note(f"Crosses mark steps whose loss was not a finite number: {names_text(lost)}."))
    window = max(figures.smoothing_window(len(c.steps)) for c in curves)
    smooth = f"Pale: as logged. Strong: mean over up to {window} neighbouring points. " if window > 1 else ""
    caption = (
        f"Loss on completions, in nats per token. {smooth}Beside each name the first and the last value as drawn. "
        "Every plot has its own vertical scale."
    )
    said = f"Training loss over steps, one plot each for {names_text([c.title for c in curves])}."
    blocks.append(FigureBlock("training_loss", caption, said, lambda w: figures.training_loss(curves, w)))
    return Section(anchor, title, blocks)


def _evaluation(run: Run) -> Section:
    anchor, title = "evaluation", "Held-out scores during training"
    fills = task_fills(run.tasks)
    scores = {s.task: s for s in run.scores}
    last = run.results.steps if run.results and run.results.steps else max((e.step for e in run.evals), default=0)
    curves = [
        _evaluation_curve(run, task, fills[task], scores.get(task), last)
        for task in run.tasks
        if any(task in e.tasks for e in run.evals)
    ]
    if not curves:
        return Section(anchor, title, [Note(missing_text(run, "history.jsonl", "scores during training"))])
    caption = (
        "Points: scores during training on n held-out rows, with their 95 % band. Rings: all test rows, before and "
        "after training, as in the table above. Dashed: majority class."
    )
    said = f"Held-out score over steps, one plot each for {names_text([c.title for c in curves])}."
    block = FigureBlock("evaluation", caption, said, lambda w: figures.evaluation(curves, w))
    return Section(anchor, title, [block])


def _evaluation_curve(run: Run, task: str, fill: str, score: Score | None, last: int) -> figures.Curve:
    points: dict[int, tuple[float | None, Interval | None]] = {}
    counts = set()
    metric = ""
    for evaluation in run.evals:
        value = evaluation.tasks.get(task)
        if value is None:
            continue
        metric = value.metric
        interval = value.interval or score_interval(metric, finite(value.value), value.n)
        points[evaluation.step] = (finite(value.value), interval)
        counts.add(value.n)
    rings = []
    if score is not None and last:
        ends = ((0, score.before, score.before_interval), (last, score.after, score.after_interval))
        for step, end, interval in ends:
            if end is not None:
                points[step] = (end, interval)
                rings.append(step)
        counts = (counts - {score.n}) or counts
    steps = sorted(points)
    low, high = min(counts), max(counts)
    return figures.Curve(
        title=task,
        fill=fill,
        steps=steps,
        values=[points[step][0] for step in steps],
        intervals=[points[step][1] for step in steps],
        level=score.majority if score else None,
        rings=rings,
        note=f"n = {low}" if low == high else f"n = {low} to {high}",
        top=None if metric == "loss" else 1.0,
    )


def _mixture(run: Run) -> Section:
    anchor, title = "mixture", "Mixture and padding"
    extra = run.results.extra if run.results else None
    if extra is None or (not extra.realised_shares and finite(extra.padding_share) is None):
        return Section(anchor, title, [Note(missing_text(run, "results.json", "mixture or padding"))])
    sentences = []
    if extra.tokens is not None:
        sentences.append(f"{extra.tokens:,} tokens were trained on.")
    padding = finite(extra.padding_share)
    if padding is not None:
        sentences.append(f"{percent_text(padding)} of the positions in the batches were padding.")
    mixture = run.config.get("mixture")
    if isinstance(mixture, dict):
        tempered = mixture.get("strategy") == "temperature"  # no other strategy has a use for it
        asked = {key: v for key, v in mixture.items() if v is not None and (tempered or key != "temperature")}
        named = [f"{key} {value_text(value)}" for key, value in asked.items()]
        sentences.append(f"Asked for: {', '.join(named)}.")
    blocks: list[Block] = [Text(" ".join(sentences))] if sentences else []
    if extra.realised_shares:
        groups = _share_groups(extra.realised_shares, task_fills(dict.fromkeys([*run.tasks, *extra.realised_shares])))
        most = max((b.value for g in groups for b in g.bars if b.value is not None), default=1.0)
        limit = min(1.0, most * 1.1) or 1.0
        caption = "Share of each task in what was trained on, by rows and by tokens."
        said = "Bars of each task's share of rows and of tokens."
        bars = FigureBlock(
            "mixture", caption, said, lambda w: figures.grouped_bars(groups, w, limit=limit, percent=True)
        )
        blocks.append(bars)
    return Section(anchor, title, blocks)


def _share_groups(shares: dict[str, RealisedShare], fills: dict[str, str]) -> list[figures.BarGroup]:
    groups = []
    for task, share in shares.items():
        bars = [
            figures.Bar("rows", finite(share.row_share), fills[task]),
            figures.Bar("tokens", finite(share.token_share), fills[task]),
        ]
        counts = [f"{n:,} {what}" for n, what in ((share.rows, "rows"), (share.tokens, "tokens")) if n is not None]
        groups.append(figures.BarGroup(task, fills[task], bars, ", ".join(counts)))
    return groups


def _settings(run: Run) -> Section:
    anchor, title = "settings", "Settings"
    if run.config_text is None:
        return Section(anchor, title, [Note(missing_text(run, "config.yaml", "the settings"))])
    blocks: list[Block] = [Note(run.notes["config.yaml"])] if "config.yaml" in run.notes else []
    return Section(anchor, title, [*blocks, Code("config.yaml, as resolved", run.config_text)])
