"""Figures of scores and losses: plain values in, a matplotlib `Figure` out.

Every function takes the figure's width in pixels and lays itself out for it, so that a phone gets a drawing of its own
and not a shrunken one. Draw and save inside `theme.style()`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from headwater.report.layout import (
    TITLE,
    TWO_LINE_TITLE,
    Canvas,
    Sheet,
    axis_name,
    fit,
    panel_title,
    panels,
    text_width,
)
from headwater.report.run import Interval, finite
from headwater.report.theme import colour

_MOST_POINTS = 400


@dataclass(frozen=True)
class Bar:
    """One bar: a value with its interval, or None where there is none."""

    label: str
    value: float | None
    fill: str
    interval: Interval | None = None


@dataclass(frozen=True)
class BarGroup:
    """Bars that belong together, under one title.

    Args:
        fill: colour of the title's dot.
        note: short text at the right of the title.
        mark: a value to compare the bars with, drawn as a line across them.
        mark_note: its name, at the far right of the title beside a piece of the same line.
    """

    title: str
    fill: str
    bars: Sequence[Bar]
    note: str = ""
    mark: float | None = None
    mark_note: str = ""


@dataclass(frozen=True)
class Curve:
    """Values over steps, rising.

    Args:
        intervals: 95 % interval of each point, None where unknown; may be empty.
        level: a constant to compare the curve with.
        rings: the steps whose points are set apart, because they rest on more rows than the others.
        note: short text beside the title.
        top: upper end of the vertical scale, None for the curve's own.
    """

    title: str
    fill: str
    steps: Sequence[int]
    values: Sequence[float | None]
    intervals: Sequence[Interval | None] = ()
    level: float | None = None
    rings: Sequence[int] = ()
    note: str = ""
    top: float | None = None


def grouped_bars(groups: Sequence[BarGroup], width: float, *, limit: float = 1.0, percent: bool = False) -> Figure:
    """Horizontal bars from 0 to `limit`, a block per group, with whiskers for intervals and the value at the right."""
    head, bar, gap, foot, top = 25, 17, 16, 24, 2
    longest = max((text_width(b.label, 11) for group in groups for b in group.bars), default=0)
    labels = min(longest, 0.58 * width) + 8
    values = 58 if percent else 48
    height = top + sum(head + bar * len(group.bars) + gap for group in groups) + foot
    canvas = Canvas(width, height)
    axes = canvas.axes(labels, 0, width - labels - values, height - foot)
    axes.set_xlim(0, limit)
    axes.set_ylim(height - foot, 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %" if percent else f"{x:g}")
    sheet = canvas.sheet()
    y = float(top)
    for group in groups:
        _group_title(sheet, group, y + 11, width)
        y += head
        if group.mark is not None:
            axes.plot([group.mark] * 2, [y - 2, y + bar * len(group.bars) + 2], color=colour("ink"), lw=1.6, zorder=4)
        for item in group.bars:
            _bar(axes, sheet, item, y, bar, labels, width, percent)
            y += bar
        y += gap
    return canvas.figure


def _group_title(sheet: Sheet, group: BarGroup, y: float, width: float) -> None:
    right = width
    if group.mark is not None:
        sheet.text(right, y, group.mark_note, 11, align="right", ink="muted")
        right -= text_width(group.mark_note, 11) + 7
        sheet.tick(right, y, 12)
        right -= 14
    sheet.text(right, y, group.note, 11, align="right", ink="muted")
    right -= text_width(group.note, 11) + 10
    sheet.dot(5, y, group.fill)
    sheet.text(15, y, fit(group.title, right - 15, 12.5, bold=True), 12.5, bold=True)


def _bar(axes: Axes, sheet: Sheet, item: Bar, y: float, bar: float, labels: float, width: float, percent: bool) -> None:
    middle = y + bar / 2
    sheet.text(labels - 8, middle, fit(item.label, labels - 7, 11), 11, align="right", ink="muted")
    if item.value is None:
        sheet.text(width, middle, "no value", 11, align="right", ink="muted")
        return
    axes.add_patch(Rectangle((0, y + 1.5), item.value, bar - 3, facecolor=item.fill, edgecolor="none", zorder=2))
    if item.interval is not None:
        low, high = item.interval
        # A pale line under the dark one keeps the whisker visible where it crosses its own bar.
        axes.plot([low, high], [middle] * 2, color=colour("paper"), lw=3.2, zorder=3, solid_capstyle="butt")
        axes.plot([low, high], [middle] * 2, color=colour("ink"), lw=1.1, zorder=3, solid_capstyle="butt")
        for end in (low, high):
            axes.plot([end] * 2, [middle - 3.5, middle + 3.5], color=colour("ink"), lw=1.1, zorder=3)
    value = f"{100 * item.value:.1f} %" if percent else f"{item.value:.3f}"
    sheet.text(width, middle, value, 11.5, align="right")


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values; at both ends over what there is."""
    half = window // 2
    parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(part) / len(part) for part in parts]


def smoothing_window(points: int) -> int:
    """An odd number of points to average over: a fifteenth of the curve, but at most 31."""
    return 2 * min(points // 30, 15) + 1


def thin(steps: Sequence[int], values: Sequence[float], most: int = _MOST_POINTS) -> tuple[list[int], list[float]]:
    """At most about `most` of the points: of each stretch its lowest and its highest, so that no peak is lost."""
    if len(values) <= most:
        return list(steps), list(values)
    size = -(-2 * len(values) // most)
    kept: list[int] = []
    for start in range(0, len(values), size):
        stretch = range(start, min(start + size, len(values)))
        kept += sorted({min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)})
    return [steps[i] for i in kept], [values[i] for i in kept]


def _grid(count: int, width: float) -> tuple[Canvas, list[Axes], float]:
    wide = width >= 600
    title = TITLE if wide else TWO_LINE_TITLE
    return *panels(count, width, min(count, 3 if wide else 2), 104, title=title), title


def training_loss(curves: Sequence[Curve], width: float) -> Figure:
    """One plot per curve, each with its own vertical scale from 0: the raw values pale, their running mean in front. A
    value that is not finite is a cross at the top edge."""
    canvas, grid, title = _grid(len(curves), width)
    last = max((step for curve in curves for step in curve.steps), default=0)
    for axes, curve in zip(grid, curves, strict=True):
        broken = [s for s, v in zip(curve.steps, curve.values, strict=True) if finite(v) is None]
        steps = [s for s, v in zip(curve.steps, curve.values, strict=True) if finite(v) is not None]
        values = [v for v in map(finite, curve.values) if v is not None]
        smooth = running_mean(values, smoothing_window(len(values)))
        axes.set_xlim(0, last or 1)
        if len(values) < 2:
            axes.plot(steps, values, "o", ms=4, color=curve.fill, clip_on=False)
        elif smooth != values:
            axes.plot(*thin(steps, values), color=curve.fill, alpha=0.3, lw=0.8)
        axes.plot(*thin(steps, smooth), color=curve.fill)
        axes.set_ylim(min([0.0, *values]), max([1e-9, *values]) * 1.05)
        axes.plot(broken, [0.96] * len(broken), "x", ms=6, mew=1.6, color=colour("ink"),
                  transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
        axis_name(axes, "step")
        note = f"{smooth[0]:.2f} → {smooth[-1]:.2f}" if smooth else "no values"
        panel_title(canvas, axes, curve.title, note, curve.fill, title=title)
    return canvas.figure


def evaluation(curves: Sequence[Curve], width: float) -> Figure:
    """One plot per curve: points with their 95 % band, those set apart as rings, and the level to beat dashed."""
    canvas, grid, title = _grid(len(curves), width)
    last = max((step for curve in curves for step in curve.steps), default=0) or 1
    for axes, curve in zip(grid, curves, strict=True):
        intervals = curve.intervals or [None] * len(curve.steps)
        points = [
            (step, value, interval)
            for step, value, interval in zip(curve.steps, map(finite, curve.values), intervals, strict=True)
            if value is not None
        ]
        steps, values = [p[0] for p in points], [p[1] for p in points]
        bands = [(step, *interval) for step, _, interval in points if interval is not None]
        axes.set_xlim(-0.02 * last, 1.02 * last)
        axes.fill_between(
            [b[0] for b in bands], [b[1] for b in bands], [b[2] for b in bands], color=curve.fill, alpha=0.16, lw=0
        )
        axes.plot(steps, values, color=curve.fill, lw=1.6, clip_on=False)
        inner = [(s, v) for s, v in zip(steps, values, strict=True) if s not in curve.rings]
        rings = [(s, v) for s, v in zip(steps, values, strict=True) if s in curve.rings]
        axes.plot([s for s, _ in inner], [v for _, v in inner], "o", ms=4, mew=0, color=curve.fill, clip_on=False)
        axes.plot([s for s, _ in rings], [v for _, v in rings], "o", ms=6.5, mew=1.6, mec=curve.fill,
                  mfc=colour("paper"), clip_on=False, zorder=4)  # fmt: skip
        if curve.top is None:
            axes.set_ylim(0, max([1e-9, *values, *(b[2] for b in bands)]) * 1.08)
        else:
            axes.set_ylim(0, curve.top)
            axes.set_yticks([0, curve.top / 2, curve.top], ["0", f"{curve.top / 2:g}", f"{curve.top:g}"])
        if curve.level is not None:
            axes.axhline(curve.level, color=colour("ink"), lw=1, dashes=(3, 2.5))
        axis_name(axes, "step")
        panel_title(canvas, axes, curve.title, curve.note, curve.fill, title=title)
    return canvas.figure
