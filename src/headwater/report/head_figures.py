"""Figures of the heads: how alike they are, and which task uses which. Draw and save inside `theme.style()`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from headwater.report.layout import (
    Canvas,
    Sheet,
    axis_name,
    draw_key,
    fit,
    key_rows,
    panel_title,
    panels,
    scale_key,
    text_width,
)
from headwater.report.modules import Array, distance_from_mean, mean_over
from headwater.report.theme import TASK_COLOURS, colour

Routing = Mapping[str, tuple[list[int], list[str], Array]]
"""Projection -> (layers, tasks, shares [tasks, layers, heads]), as `modules.routing_arrays` makes it."""

_COSINE_KEY = ("−1 opposite", "0", "1 the same")


def number(value: float | None, digits: int = 2) -> str:
    """A number for a small cell: `.07`, `−.12`, `1.0`."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    text = text[1:] if text.startswith("0") else "1.0"
    return ("−" if value < 0 and float(f"{value:.{digits}f}") != 0 else "") + text


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def head_similarity(table: Mapping[str, Mapping[int, float | None]], layers: Sequence[int], width: float) -> Figure:
    """Mean cosine between different heads, projection by layer, with each projection's mean over its layers.

    Layers run across where there is room for their numbers, else down.
    """
    across = width >= 600
    names = list(table)
    if across:
        left = min(max(text_width(n, 11) for n in names) + 12, 190)
        step, high = min((width - left - 52) / len(layers), 44), 24
        size = (width, 40 + 20 + high * len(names) + 8)
    else:
        left = 38
        step, high = min((width - left) / len(names), 76), 17 if len(layers) <= 48 else 10
        size = (width, 40 + 20 + high * (len(layers) + 1) + 14)
    canvas = Canvas(*size)
    scale_key(canvas, 0, _COSINE_KEY, "mean cosine")
    sheet = canvas.sheet(0, 40)
    every = next(n for n in (1, 2, 5, 10, 20, 50, len(layers)) if n * (step if across else high) >= 16)
    end = 20 + high * len(layers) + 6  # where the row of means begins, when layers run down
    for i, layer in enumerate(layers):
        if i % every == 0 and across:
            sheet.text(left + i * step + step / 2, 9, str(layer), 10, align="center", ink="muted")
        elif i % every == 0:
            sheet.text(left - 8, 20 + i * high + high / 2, str(layer), 10, align="right", ink="muted")
    sheet.text(left - 8, 9, "layer", 10, align="right", ink="muted")
    if across:
        sheet.text(left + step * len(layers) + 28, 9, "mean", 10, align="center", ink="muted")
    else:
        sheet.text(left - 8, end + 8, "mean", 10, align="right", ink="muted")
    for p, name in enumerate(names):
        row = table[name]
        mean = _mean(list(row.values()))
        if across:
            y = 20 + p * high
            sheet.text(left - 8, y + high / 2, fit(name, left - 8, 11), 11, align="right")
            for i, layer in enumerate(layers):
                value = row.get(layer)
                sheet.cell(left + i * step, y, step, high, value, number(value) if step >= 18 else "")
            sheet.cell(left + step * len(layers) + 8, y, 40, high, mean, number(mean))
        else:
            x = left + p * step
            sheet.text(x + step / 2, 8, fit(name, step - 4, 10.5), 10.5, align="center")
            for i, layer in enumerate(layers):
                value = row.get(layer)
                sheet.cell(x, 20 + i * high, step, high, value, number(value) if high >= 14 else "")
            sheet.cell(x, end, step, max(high, 17), mean, number(mean))
    return canvas.figure


def head_matrices(matrices: Mapping[str, Mapping[int, Array]], layers: Sequence[int], width: float) -> Figure:
    """Cosine of every pair of heads, for each projection at a few layers."""
    names = list(matrices)
    across = width >= 600 and len(names) <= 7  # a column per projection, else a row per projection
    columns = len(names) if across else len(layers)
    left, gap, title, name_line = 17, 20, 24, 24
    side = min((width - columns * (left + gap) + gap) / columns, 112)
    block = title + side + gap
    height = 44 + (name_line + block * len(layers) if across else (name_line + block) * len(names)) - gap + 2
    canvas = Canvas(width, height)
    scale_key(canvas, 0, _COSINE_KEY, "cosine")
    page = canvas.sheet()
    for p, name in enumerate(names):
        x, y = (p * (left + side + gap), 44) if across else (0, 44 + p * (name_line + block))
        room = side if across else width - left
        page.text(x + left, y + 10, fit(name, room, 11.5, bold=True), 11.5, bold=True)
        for k, layer in enumerate(layers):
            corner = (x, y + name_line + k * block) if across else (k * (left + side + gap), y + name_line)
            matrix = matrices[name].get(layer)
            sheet = canvas.sheet(*corner)
            sheet.text(left, 10, f"layer {layer}" if matrix is not None else f"no layer {layer}", 10.5, ink="muted")
            if matrix is not None:
                _matrix(sheet, matrix, left, title, side)
    return canvas.figure


def _matrix(sheet: Sheet, matrix: Array, left: float, top: float, side: float) -> None:
    step = side / len(matrix)
    for i, row in enumerate(matrix):
        if step >= 9:
            sheet.text(left - 5, top + i * step + step / 2, str(i + 1), min(10, step * 0.8), align="right", ink="muted")
        for j, value in enumerate(row):
            # The diagonal is always 1 and would outshine the rest.
            known = float(value) if i != j and np.isfinite(value) else None
            text = number(float(value)) if i != j and step >= 22 else ""
            sheet.cell(left + j * step, top + i * step, step, step, known, text)


def router_use(routing: Routing, fills: Mapping[str, str], width: float) -> Figure:
    """Share of each head per task, averaged over layers: one table per projection, colour relative to equal shares."""
    names = list(routing)
    tasks = next(iter(routing.values()))[1]
    heads = max(shares.shape[2] for _, _, shares in routing.values())
    name_width = min(max(text_width(t, 11) for t in tasks) + 26, 200 if width >= 600 else 124)
    high, head, gap = 24, 42, 20
    room = width - name_width + gap
    # As many projections side by side as leave every cell wide enough for its two digits.
    columns = max([1, *(c for c in range(1, len(names) + 1) if (room / c - gap) / heads >= 22)])
    step = min((room / columns - gap) / heads, 46)
    blocks = -(-len(names) // columns)
    canvas = Canvas(width, 42 + blocks * (head + high * len(tasks) + gap) - gap + 2)
    scale_key(canvas, 0, ("half", "equal share", "double"), "share of a head")
    for p, name in enumerate(names):
        block, column = divmod(p, columns)
        top = 42 + block * (head + high * len(tasks) + gap)
        shares = mean_over(routing[name][2], 1)
        count = shares.shape[-1]
        x = name_width + column * (step * heads + gap)
        sheet = canvas.sheet(0, top)
        sheet.text(x, 9, fit(name, step * heads, 11.5, bold=True), 11.5, bold=True)
        for n in range(count):
            label = f"head {n + 1}" if step >= 44 else str(n + 1)
            sheet.text(x + n * step + step / 2, 31, label, 10, align="center", ink="muted")
        for t, task in enumerate(tasks):
            y = head + t * high
            if column == 0:
                sheet.dot(5, y + high / 2, fills[task])
                sheet.text(14, y + high / 2, fit(task, name_width - 22, 11), 11)
            for n in range(count):
                share = float(shares[t, n])
                known = share if np.isfinite(share) else None
                relative = None if known is None else math.log2(max(known * count, 1e-6))
                text = "–" if known is None else f"{100 * known:.0f}"
                sheet.cell(x + n * step, y, step, high, relative, text)
    return canvas.figure


def plots_by_projection(routing: Routing) -> bool:
    """Whether a plot for every head of every projection is still a readable number of plots."""
    return sum(shares.shape[2] for _, _, shares in routing.values()) <= 12


def router_by_layer(routing: Routing, fills: Mapping[str, str], width: float) -> Figure:
    """Share of each head over the layers, a line per task: a plot per projection and head, or per head if those would
    be too many."""
    tasks = next(iter(routing.values()))[1]
    heads = max(shares.shape[2] for _, _, shares in routing.values())
    plots: list[tuple[str, list[int], Array]] = []
    if plots_by_projection(routing):
        for name, (layers, _, shares) in routing.items():
            plots += [(f"{name} · head {n + 1}", layers, shares[:, :, n]) for n in range(shares.shape[2])]
        columns = heads if width >= 600 else 2
    else:
        every = sorted({layer for layers, _, _ in routing.values() for layer in layers})
        stack = np.full((len(routing), len(tasks), len(every), heads), np.nan)
        for p, (layers, _, shares) in enumerate(routing.values()):
            stack[p][:, [every.index(layer) for layer in layers], : shares.shape[2]] = shares
        mean = mean_over(stack, 0)
        plots = [(f"head {n + 1}", every, mean[:, :, n]) for n in range(heads)]
        columns = min(heads, 4 if width >= 600 else 2)
    top = max(float(np.nanmax(values)) for _, _, values in plots)
    return _task_lines(plots, tasks, fills, width, columns, limit=min(1.0, top * 1.1), level=1 / heads, percent=True)


def router_distance(routing: Routing, fills: Mapping[str, str], width: float) -> Figure:
    """How far each task's head shares are from the mean over tasks, layer by layer, a plot per projection."""
    tasks = next(iter(routing.values()))[1]
    plots = [(name, layers, distance_from_mean(shares)) for name, (layers, _, shares) in routing.items()]
    top = max((float(np.nanmax(values)) for _, _, values in plots if np.isfinite(values).any()), default=0.0)
    # A fixed least height: differences of a hundredth should look like that.
    limit = max(0.1, min(1.0, top * 1.1))
    columns = min(len(plots), 3 if width >= 600 else 1)
    return _task_lines(plots, tasks, fills, width, columns, limit=limit, level=None, percent=False)


def _task_lines(
    plots: Sequence[tuple[str, list[int], Array]],
    tasks: Sequence[str],
    fills: Mapping[str, str],
    width: float,
    columns: int,
    *,
    limit: float,
    level: float | None,
    percent: bool,
) -> Figure:
    key = key_rows(tasks, width)
    canvas, grid = panels(len(plots), width, columns, 92, top=18 * len(key) + 8)
    draw_key(canvas, 0, key, (fills[task] for task in tasks))
    for axes, (name, layers, values) in zip(grid, plots, strict=True):
        if level is not None:
            axes.axhline(level, color=colour("ink"), lw=1, dashes=(3, 2.5), zorder=1)
        for t, task in enumerate(tasks):
            line = "o" if len(layers) == 1 else "-" if t < TASK_COLOURS else "--"
            axes.plot(layers, values[t], line, color=fills[task], lw=1.4, clip_on=False)
        axes.set_ylim(0, limit)
        axes.set_xlim(min(layers) - (len(layers) == 1), max(layers) + (len(layers) == 1))
        if percent:
            axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
        axis_name(axes, "layer")
        panel_title(canvas, axes, name)
    return canvas.figure


def head_map(places: Array, fills: Mapping[str, str], width: float) -> Figure:
    """Places of heads `[steps, layers, heads, 2]`: a colour per head, larger and darker with every step; a line joins
    one layer's head over steps. `fills`: a colour for each head, by its name."""
    key = key_rows(list(fills), width)
    top = 18 * len(key) + 10
    side = min(width, 460.0)
    canvas = Canvas(width, top + side)
    draw_key(canvas, 0, key, list(fills.values()))
    axes = canvas.axes((width - side) / 2, top, side, side)
    axes.set_axis_off()
    axes.margins(0.04)
    steps = len(places)
    for n, fill in enumerate(fills.values()):
        for layer in range(places.shape[1]):
            axes.plot(*places[:, layer, n].T, color=fill, lw=0.6, alpha=0.35, zorder=2)
        for step in range(steps):
            late = (step + 1) / steps
            axes.plot(*places[step, :, n].T, "o", ms=2 + 4 * late, mew=0, color=fill, alpha=0.2 + 0.7 * late, zorder=3)
    return canvas.figure
