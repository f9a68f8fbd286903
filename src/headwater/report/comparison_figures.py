"""Figures of a comparison: plain values in, a matplotlib `Figure` out. Draw and save inside `theme.style()`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headwater.report.layout import Canvas, fit, text_width
from headwater.report.run import Interval
from headwater.report.theme import colour

_ROW, _HEAD, _FOOT = 27, 28, 28


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
    """Each method's seeds as pale points, their mean with its interval in front, and the mean's number at the right.

    Blocks stand side by side with common labels where there is room, else one below the other.
    """
    labels = min(max(text_width(s.label, 11.5) for block in blocks for s in block.spreads) + 14, 150)
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
    axes.plot(spread.values, [y] * len(spread.values), "o", ms=5, mew=0, color=spread.fill, alpha=0.38, zorder=3)
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
