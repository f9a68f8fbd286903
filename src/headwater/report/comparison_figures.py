"""Figures of a comparison: plain values in, a matplotlib `Figure` out. Draw and save inside `theme.style()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headwater.report.figures import thin
from headwater.report.layout import (
    TITLE,
    TWO_LINE_TITLE,
    Canvas,
    axis_name,
    draw_key,
    fit,
    key_rows,
    panel_title,
    panels,
    scale_key,
    text_width,
)
from headwater.report.run import Interval
from headwater.report.text import short_count_text
from headwater.report.theme import TASK_COLOURS, colour

_ROW, _HEAD, _FOOT = 30, 28, 28


@dataclass(frozen=True)
class Spread:
    """One method's values over seeds, with their mean and its interval."""

    label: str
    fill: str
    values: Sequence[float]
    mean: float | None
    interval: Interval | None = None


@dataclass(frozen=True)
class SpreadBlock:
    """Spreads on one scale under a title. `zero` draws the line that they are compared with."""

    title: str
    spreads: Sequence[Spread]
    zero: bool = False
    sign: str = ""


def spreads(blocks: Sequence[SpreadBlock], width: float) -> Figure:
    """Each method's seeds as small points above their mean with its interval, and the mean's number at the right.

    Blocks stand side by side with common labels where there is room, else one below the other.
    """
    labels = min(max(text_width(s.label, 11.5) for block in blocks for s in block.spreads) + 24, 150)
    wide = width >= 600
    columns = len(blocks) if wide else 1
    height = [_HEAD + _ROW * len(block.spreads) + _FOOT for block in blocks]
    canvas = Canvas(width, max(height) if wide else sum(height) + 10 * (len(blocks) - 1))
    between, top = 30, 0.0
    part = (width - labels - between * (columns - 1)) / columns
    for i, block in enumerate(blocks):
        left = labels + i * (part + between) if wide else labels
        _spread_block(canvas, block, left, top, part, labels if i == 0 or not wide else 0)
        top += 0 if wide else height[i] + 10
    return canvas.figure


def _spread_block(canvas: Canvas, block: SpreadBlock, left: float, top: float, width: float, labels: float) -> None:
    numbers = text_width("+0.000", 11) + 12
    rows = _ROW * len(block.spreads)
    axes = canvas.axes(left, top + _HEAD, width - numbers, rows)
    axes.set_xlim(*_limits(block))
    axes.set_ylim(rows, 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.locator_params(axis="x", nbins=4)
    sheet = canvas.sheet(0, top)
    start = left - labels
    sheet.text(start, 10, fit(block.title, labels + width, 12, bold=True), 12, bold=True)
    if block.zero:
        axes.axvline(0, color=colour("ink"), lw=1, dashes=(3, 2.5))
    for row, spread in enumerate(block.spreads):
        middle = _ROW * (row + 0.5)
        if labels:
            sheet.dot(start + 5, _HEAD + middle, spread.fill)
            name = fit(spread.label, labels - 22, 11.5)
            sheet.text(start + 15, _HEAD + middle, name, 11.5)
        number = "–" if spread.mean is None else f"{spread.mean:{block.sign}.3f}".replace("-", "−")
        sheet.text(left + width, _HEAD + middle, number, 11, align="right")
        _spread(axes, spread, middle)


def _limits(block: SpreadBlock) -> Interval:
    """The seeds' values with room on both sides, and what of the intervals does not squeeze them."""
    points = [v for s in block.spreads for v in (*s.values, *([] if s.mean is None else [s.mean]))]
    if block.zero:
        points.append(0.0)
    if not points:
        return 0.0, 1.0
    low, high = min(points), max(points)
    room = max(high - low, 0.01)
    ends = [v for s in block.spreads if s.interval for v in s.interval]
    low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    return low - 0.06 * (high - low or room), high + 0.06 * (high - low or room)


def _spread(axes: Axes, spread: Spread, y: float) -> None:
    low, high = axes.get_xlim()
    # Above the line, or the line and the mean would hide them.
    axes.plot(spread.values, [y - 8] * len(spread.values), "o", ms=4, mew=0, color=spread.fill, alpha=0.7, zorder=3)
    if spread.interval is not None:
        ends = [min(max(end, low), high) for end in spread.interval]
        axes.plot(ends, [y, y], color=colour("ink"), lw=1.3, zorder=4, solid_capstyle="butt")
        for end, shown, arrow in zip(spread.interval, ends, "<>", strict=True):
            if end == shown:
                axes.plot([end, end], [y - 5, y + 5], color=colour("ink"), lw=1.3, zorder=4)
            else:  # it goes on beyond the scale
                axes.plot([shown], [y], arrow, ms=6, mew=0, color=colour("ink"), zorder=4, clip_on=False)
    if spread.mean is not None:
        axes.plot([spread.mean], [y], "o", ms=8, mew=1.4, mec=colour("paper"), color=spread.fill, zorder=5)


@dataclass(frozen=True)
class Size:
    """One method's trainable parameters and score."""

    label: str
    fill: str
    parameters: int
    mean: float
    interval: Interval | None = None


def _point(place: int, fill: str) -> dict[str, Any]:
    """A point's colours: as in the key, a ring where the colours have started over."""
    ring = place >= TASK_COLOURS
    return {"mew": 1.4, "mec": fill if ring else colour("paper"), "mfc": colour("paper") if ring else fill}


def parameters_against_score(sizes: Sequence[Size], width: float) -> Figure:
    """Trainable parameters across, score up, a point with its interval for each method; the key above names them."""
    key = key_rows([size.label for size in sizes], width)
    left, foot, top, height = 44, 34, 18 * len(key) + 14, 210
    canvas = Canvas(width, top + height + foot)
    draw_key(canvas, 0, key, [size.fill for size in sizes])
    axes = canvas.axes(left, top, width - left - 8, height)
    axes.grid(axis="both")
    axes.spines["left"].set_visible(False)
    low, high = min(s.parameters for s in sizes), max(s.parameters for s in sizes)
    room = max(0.12 * (high - low), 0.05 * high)  # equal sizes should look equal
    axes.set_xlim(low - room, high + room)
    axes.locator_params(axis="x", nbins=6 if width >= 600 else 4)
    axes.locator_params(axis="y", nbins=5)
    axes.xaxis.set_major_formatter(lambda x, _: short_count_text(round(x)))
    spread = SpreadBlock("", [Spread(s.label, s.fill, [s.mean], s.mean, s.interval) for s in sizes])
    axes.set_ylim(*_limits(spread))
    for i, size in enumerate(sizes):
        if size.interval is not None:
            bottom, ceiling = axes.get_ylim()
            ends = [min(max(end, bottom), ceiling) for end in size.interval]
            axes.plot([size.parameters] * 2, ends, color=size.fill, lw=1.4, alpha=0.75, zorder=3)
        axes.plot([size.parameters], [size.mean], "o", ms=8, **_point(i, size.fill), zorder=4)
    canvas.sheet().text(width - 8, top + height + 26, "trainable parameters", 10, align="right", ink="muted")
    return canvas.figure


def differences(
    table: Mapping[str, Mapping[str, float | None]], first: str, width: float, *, turn: bool = True
) -> Figure:
    """Method by task: the mean difference to what `first` names; see `signed_table`."""
    return signed_table(table, f"minus {fit(first, 120, 10.5)}", width, turn=turn)


def signed_table(
    table: Mapping[str, Mapping[str, float | None]], title: str, width: float, *, turn: bool = True
) -> Figure:
    """Numbers around 0, coloured on a scale that ends at the largest of them.

    Args:
        table: row -> column -> number; all rows have the same columns.
        title: of the scale.
        turn: where room is short, let rows and columns change places if that helps.
    """
    tasks = list(next(iter(table.values())))
    known = [abs(v) for row in table.values() for v in row.values() if v is not None]
    most = max([0.01, *known])
    across = not turn or width >= 600 or len(table) > len(tasks)
    rows, columns = (list(table), tasks) if across else (tasks, list(table))
    left = min(max(text_width(name, 11) for name in rows) + 12, 190 if width >= 600 else 128)
    step, high = min((width - left) / len(columns), 110), 26
    turned = any(text_width(name, 10.5) > step - 6 for name in columns)
    if turned:  # the last name leans out at the right
        lean = 0.72 * min(text_width(columns[-1], 10.5), 90) + 8
        step = min((width - left - lean) / (len(columns) - 0.5), 110)
    head = min(max(text_width(name, 10.5) for name in columns), 90) * 0.72 + 16 if turned else 22
    canvas = Canvas(width, 42 + head + high * len(rows) + 2)
    scale_key(canvas, 0, (f"−{most:.3f}", "0", f"+{most:.3f}"), title)
    sheet = canvas.sheet(0, 42)
    for c, name in enumerate(columns):
        x = left + c * step + step / 2
        if turned:
            canvas.figure.text(
                x, head - 6, fit(name, 90, 10.5), fontsize=10.5, rotation=45, rotation_mode="anchor",
                ha="left", va="center", color=colour("ink"), transform=sheet.pixels,
            )  # fmt: skip
        else:
            sheet.text(x, 10, name, 10.5, align="center")
    for r, name in enumerate(rows):
        y = head + r * high
        sheet.text(left - 8, y + high / 2, fit(name, left - 10, 11), 11, align="right")
        for c, column in enumerate(columns):
            value = table[name][column] if across else table[column][name]
            text = "–" if value is None else f"{value:+.3f}".replace("-", "−")
            text = text.replace("0.", ".") if step < 48 else text
            sheet.cell(left + c * step, y, step, high, None if value is None else value / most, text)
    return canvas.figure


@dataclass(frozen=True)
class Line:
    """One method's values over steps, rising."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Several methods' lines on one scale. `bottom` and `top` of None are the lines' own."""

    title: str
    lines: Sequence[Line]
    note: str = ""
    bottom: float | None = None
    top: float | None = None


def method_curves(plots: Sequence[Panel], fills: Mapping[str, str], width: float) -> Figure:
    """A plot per panel with a line per method; where colours start over, lines are dashed."""
    labels = [label for label in fills if any(line.label == label for plot in plots for line in plot.lines)]
    key = key_rows(labels, width)
    wide = width >= 600
    columns = min(len(plots), 3) if wide else 1 if len(plots) == 1 else 2
    title = TITLE if wide else TWO_LINE_TITLE
    canvas, grid = panels(len(plots), width, columns, 120, top=18 * len(key) + 10, title=title)
    draw_key(canvas, 0, key, (fills[label] for label in labels))
    order = list(fills)
    for axes, plot in zip(grid, plots, strict=True):
        last = max((step for line in plot.lines for step in line.steps), default=1)
        axes.set_xlim(0, last or 1)
        for line in plot.lines:
            dashes = "-" if order.index(line.label) < TASK_COLOURS else "--"
            marks = "o" if len(line.steps) <= 12 else ""
            axes.plot(*thin(line.steps, line.values), dashes, marker=marks, ms=3.2, mew=0, color=fills[line.label],
                      lw=1.6, clip_on=False)  # fmt: skip
        values = [v for line in plot.lines for v in line.values]
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = 0.06 * ((high - low) or 1.0)
        axes.set_ylim(low - room if plot.bottom is None else plot.bottom, high + room if plot.top is None else plot.top)
        axis_name(axes, "step")
        panel_title(canvas, axes, plot.title, plot.note, title=title)
    return canvas.figure


def scatter(
    points: Mapping[str, Sequence[tuple[float, float]]], fills: Mapping[str, str], width: float, names: tuple[str, str]
) -> Figure:
    """Points of several methods, (across, up), with a key above; `names` are those of the two axes."""
    key = key_rows(list(points), width)
    left, foot, top, height = 48, 34, 18 * len(key) + 26, 210
    canvas = Canvas(width, top + height + foot)
    draw_key(canvas, 0, key, [fills[label] for label in points])
    axes = canvas.axes(left, top, width - left - 8, height)
    axes.grid(axis="both")
    axes.margins(0.06)
    axes.locator_params(axis="x", nbins=6 if width >= 600 else 4)
    axes.locator_params(axis="y", nbins=5)
    for i, (label, pairs) in enumerate(points.items()):
        axes.plot(*zip(*pairs, strict=True), "o", ms=7, **_point(i, fills[label]), zorder=3)
    sheet = canvas.sheet()
    sheet.text(width - 8, top + height + 26, names[0], 10, align="right", ink="muted")
    sheet.text(0, top - 12, names[1], 10, ink="muted")
    return canvas.figure
