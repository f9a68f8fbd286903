"""The report of `headwater prefer`: scores of the strategies, and which source was picked where and when."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from headwater.report import figures, write_page
from headwater.report.html import Block, Cell, Code, FigureBlock, Note, Page, Section, Table, Text, render
from headwater.report.layout import Canvas, draw_key, fit, key_rows
from headwater.report.rounds import Rounds, early, late, run_folder
from headwater.report.text import (
    change_text,
    count_text,
    duration_text,
    interval_text,
    names_text,
    percent_text,
    score_text,
    short_count_text,
)
from headwater.report.theme import colour, task_colour_names, task_fills

Runs = Mapping[str, Mapping[int, Rounds]]
"""Strategy -> seed -> its rounds."""


def write_preference_report(folder: Path) -> Path:
    """Writes `report.html` and `figures/` into the folder of `headwater prefer` and returns the page's path.

    Reads `results.json`, `prefer.yaml` and each run's `result.json`, which must be there.
    """
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    runs = {
        strategy: {
            seed: json.loads((run_folder(folder, strategy, seed) / "result.json").read_text(encoding="utf-8"))["rounds"]
            for seed in results["seeds"]
        }
        for strategy in results["scores"]
    }
    page = _page(results, runs, (folder / "prefer.yaml").read_text(encoding="utf-8"))
    return write_page(*render(page), folder)


def _page(results: Mapping[str, Any], runs: Runs, config: str) -> Page:
    scores = results["scores"]
    first = next(iter(scores))
    rate = results["late_good_pick_rate"]
    tiles = [
        (f"Held-out score of {first}", score_text(scores[first]["mean"]), f"{score_text(results['base'])} before"),
        ("Rounds", count_text(results["rounds"]), f"{len(results['seeds'])} seed(s) of each strategy"),
        ("Trained parameters", short_count_text(results["trainable_parameters"]), results["method"]),
    ]
    if rate is not None:
        tiles.insert(1, ("Late picks of the good source", percent_text(rate), "last third of the rounds"))
    base = results["base_model"].rstrip("/").rpartition("/")[2]
    return Page(
        kicker="headwater preference report",
        title=f"{names_text(list(scores))} on {base}",
        lead=_lead(results),
        tiles=tiles,
        sections=[
            _scores(results),
            _picks(results, runs),
            Section("settings", "Settings", [Code("prefer.yaml, as resolved", config)]),
        ],
        footer="Every figure is also in the folder figures beside this page, as SVG and as PNG.",
    )


def _lead(results: Mapping[str, Any]) -> str:
    first = next(iter(results["scores"]))
    better: list[str] = []
    unclear: list[str] = []
    worse: list[str] = []
    for other, difference in results["extra"]["differences"].items():
        interval = difference["ci95"]
        if interval is None or interval[0] <= 0 <= interval[1]:
            unclear.append(other)
        else:
            (better if interval[0] > 0 else worse).append(other)
    parts = [
        f"{first} is {word} {names_text(others)}."
        for word, others in (("clearly better than", better), ("clearly worse than", worse))
        if others
    ]
    if unclear:
        parts.append(f"Between {first} and {names_text(unclear)} these runs do not decide.")
    return " ".join(parts) or f"{first} scored {score_text(results['scores'][first]['mean'])} on held-out rows."


def _scores(results: Mapping[str, Any]) -> Section:
    scores, extra = results["scores"], results["extra"]
    first = next(iter(scores))
    names = task_colour_names(scores)
    rows = []
    for strategy, score in scores.items():
        difference = extra["differences"].get(strategy)
        rows.append(
            [
                Cell(strategy, f"{extra['queries_per_round'][strategy]:.3g} asked a round", names[strategy]),
                Cell(score_text(score["mean"]), interval_text(score["ci95"])),
                Cell(", ".join(map(score_text, score["seeds"]))),
                Cell("–")
                if difference is None
                else Cell(change_text(difference["mean"]), interval_text(difference["ci95"])),
                Cell(duration_text(extra["seconds"][strategy])),
            ]
        )
    caption = (
        "Mean held-out score over the tasks, after training. Under it its 95 % interval over the seeds (Student's t): "
        f"how other seeds would differ, not other rows. The difference is {first} minus the other, seed by seed."
    )
    columns = ["Strategy", "Score", "Seeds", f"{first} minus it", "Time"]
    bars = [
        figures.Bar(strategy, score["mean"], colour(names[strategy]), score["ci95"])
        for strategy, score in scores.items()
    ]
    group = figures.BarGroup(
        "Mean held-out score", colour("ink"), bars, mark=results["base"], mark_note=f"before {results['base']:.3f}"
    )
    said = "; ".join(f"{strategy} {score_text(score['mean'])}" for strategy, score in scores.items())
    blocks: list[Block] = [
        Table(columns, rows, caption),
        FigureBlock(
            "strategies",
            "Mean over the seeds. Whiskers: 95 % intervals over the seeds. Upright line: before training.",
            f"Bars of the strategies' scores: {said}.",
            lambda w: figures.grouped_bars([group], w),
        ),
    ]
    if len(extra["tasks"]) > 1:
        per_task = [
            [
                Cell(task, f"{values['metric']}, n = {values['n']:,}"),
                Cell(score_text(values["base"])),
                *(Cell(score_text(sum(values[s]) / len(values[s]))) for s in scores),
            ]
            for task, values in extra["tasks"].items()
        ]
        blocks.append(Table(["Task", "Before", *scores], per_task, "Each task's held-out score, mean over the seeds."))
    blocks += [
        Note(f"Dropped in {run}: " + "; ".join(f"{source}, {reason}" for source, reason in dropped.items()))
        for run, dropped in extra["dropped"].items()
    ]
    return Section("scores", "Scores", blocks)


def _picks(results: Mapping[str, Any], runs: Runs) -> Section:
    sources, good = results["sources"], results["good"]
    fills = list(task_fills(sources).values())
    blocks: list[Block] = [
        Text(
            f"What a pick was worth: {results['bandit_reward']}. A batch holds prompts of one task, its context; the "
            "bandit is not told which task that is, only the prompts' hidden states."
        )
    ]
    for strategy in results["scores"]:
        picked = runs[strategy]
        if all(len(r["queried"]) > 1 for rounds in picked.values() for r in rounds):
            continue
        tasks = list(dict.fromkeys(r["task"] for rounds in picked.values() for r in rounds))
        columns = ["Task", *(f"{source}" for source in sources)]
        caption = (
            f"{strategy}: share of a task's rounds in which a source was picked, in the last third; under it in the "
            "first third. All seeds."
        )
        blocks.append(Table(columns, [_pick_row(t, sources, good, picked) for t in tasks], caption))
        bars = {
            task: {seed: [r for r in rounds if r["task"] == task] for seed, rounds in picked.items()} for task in tasks
        }
        said = f"Which source {strategy} picked in each round of {names_text(tasks)}, one row for each seed."
        caption = f"{strategy}: the source of each round, from the first on the left to the last; a row for each seed."
        blocks.append(
            FigureBlock(
                f"picks_{strategy.replace(':', '_')}",
                caption,
                said,
                lambda w, bars=bars: picks(bars, sources, good, fills, w),  # type: ignore[misc]
            )
        )
    return Section("picks", "Picks over time, by context", blocks)


def _pick_row(task: str, sources: Sequence[str], good: Mapping[str, str], runs: Mapping[int, Rounds]) -> list[Cell]:
    # thirds of the runs: their rounds of this task within them
    first = [r for rounds in runs.values() for r in early(rounds) if r["task"] == task]
    last = [r for rounds in runs.values() for r in late(rounds) if r["task"] == task]

    def share(rounds: Rounds, source: str) -> str:
        return percent_text(sum(r["queried"] == [source] for r in rounds) / len(rounds)) if rounds else "–"

    return [
        Cell(task, f"good: {good[task]}" if task in good else ""),
        *(Cell(share(last, source), share(first, source)) for source in sources),
    ]


def picks(
    rounds: Mapping[str, Mapping[int, Rounds]],
    sources: Sequence[str],
    good: Mapping[str, str],
    fills: Sequence[str],
    width: float,
) -> Figure:
    """A strip for each task and seed, a box for each round in the colour of its source."""
    keys = key_rows(sources, width)
    head, row, gap, label = 26, 16, 12, 52
    top = 18 * len(keys) + 6
    height = top + sum(head + row * len(seeds) + gap for seeds in rounds.values())
    canvas = Canvas(width, height)
    draw_key(canvas, 0, keys, fills)
    sheet = canvas.sheet()
    y = float(top)
    for task, seeds in rounds.items():
        note = f"good: {good[task]}" if task in good else ""
        sheet.text(0, y + 12, fit(task, width - 130, 12.5, bold=True), 12.5, bold=True)
        sheet.text(width, y + 12, fit(note, 120, 11), 11, align="right", ink="muted")
        y += head
        most = max(map(len, seeds.values()), default=0)
        step = (width - label) / max(1, most)
        for seed, mine in seeds.items():
            sheet.text(0, y + row / 2, f"seed {seed}", 10.5, ink="muted")
            for i, entry in enumerate(mine):
                one = len(entry["queried"]) == 1
                fill = fills[sources.index(entry["queried"][0])] if one else colour("empty")
                sheet.box(label + i * step, y + 1, max(step - 1, 0.5), row - 3, fill)
            y += row
        y += gap
    return canvas.figure
