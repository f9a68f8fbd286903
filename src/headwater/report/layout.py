"""Placing things in a figure by pixel, and fitting text: what every figure needs.

Widths and heights are CSS pixels of the page, which are points in matplotlib's SVG files; y runs down from the top.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, Transform

from headwater.report.theme import LEVELS, TASK_COLOURS, colour, scale_colour, text_on_scale

WIDE = 780
"""Width of the page's text column."""
NARROW = 350
"""Width of the text column on a phone that is 390 pixels wide."""
TITLE, TWO_LINE_TITLE = 26, 42
"""Height of a plot's title of one line, and of one whose note is on a line of its own."""


class Canvas:
    """A figure of `width` x `height` pixels."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        w, h = self.width, self.height
        return self.figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))

    def sheet(self, left: float = 0, top: float = 0) -> Sheet:
        """A place to draw on by pixel, whose (0, 0) is at `left`, `top`."""
        # By way of the figure's own fractions, which stay right when it is saved with a margin.
        down = Affine2D().translate(left, top).scale(1 / self.width, -1 / self.height).translate(0, 1)
        return Sheet(self.figure, down + self.figure.transFigure)


class Sheet:
    """Marks and text by pixel, without the cost of axes. Colours are `#rrggbb`."""

    def __init__(self, figure: Figure, pixels: Transform):
        self.figure, self.pixels = figure, pixels

    def text(
        self, x: float, y: float, text: str, size: float, *, align: str = "left", ink: str = "ink", bold: bool = False
    ) -> None:
        """One line of text whose middle is at height `y`; `ink` is the name of a colour."""
        if text:
            weight = "bold" if bold else "normal"
            self.figure.text(x, y, text, fontsize=size, ha=align, va="center_baseline", color=colour(ink),
                             fontweight=weight, transform=self.pixels)  # fmt: skip

    def dot(self, x: float, y: float, fill: str, radius: float = 4) -> None:
        self._add(Circle((x, y), radius, facecolor=fill, edgecolor="none"))

    def ring(self, x: float, y: float, edge: str, radius: float = 3.2) -> None:
        self._add(Circle((x, y), radius, facecolor="none", edgecolor=edge, linewidth=1.6))

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self._add(Rectangle((x, y), width, height, facecolor=fill, edgecolor="none"))

    def tick(self, x: float, y: float, height: float) -> None:
        """An upright line around `y`."""
        self._add(Line2D([x, x], [y - height / 2, y + height / 2], color=colour("ink"), lw=1.6))

    def cell(self, x: float, y: float, width: float, height: float, value: float | None, text: str = "") -> None:
        """One cell of a heat map: `value` in [-1, 1] on the diverging scale, None for a cell without a number."""
        fill = colour("empty") if value is None else scale_colour(value)
        self.box(x, y, max(width - 1, 0.5), max(height - 1, 0.5), fill)
        ink = "muted" if value is None else text_on_scale(value)
        size = min(10.5, height * 0.6, width * 0.36)
        self.text(x + (width - 1) / 2, y + (height - 1) / 2, text, size, align="center", ink=ink)

    def _add(self, artist: Artist) -> None:
        artist.set_transform(self.pixels)
        self.figure.add_artist(artist)


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of one line of text in pixels; characters of East Asian width count as square."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    rest = "".join(c for c in text if unicodedata.east_asian_width(c) not in "WF")
    properties = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the measuring font lacks
        width, _, _ = text_to_path.get_text_width_height_descent(rest, properties, False) if rest else (0.0, 0, 0)
    return width + wide * size


def fit(text: str, width: float, size: float, bold: bool = False) -> str:
    """`text`, or as much of its beginning and end as `width` pixels hold, with an ellipsis between."""
    text = " ".join(text.split())
    if text_width(text, size, bold) <= width:
        return text
    low, high = 0, len(text)
    while low < high:  # the most characters that fit
        keep = (low + high + 1) // 2
        low, high = (keep, high) if text_width(_shortened(text, keep), size, bold) <= width else (low, keep - 1)
    return _shortened(text, low)


def _shortened(text: str, keep: int) -> str:
    tail = keep // 3  # names that begin alike often differ at the end
    return text[: keep - tail] + "…" + (text[-tail:] if tail else "")


def key_rows(names: Sequence[str], width: float, size: float = 11) -> list[list[tuple[float, str]]]:
    """Where the entries of a colour key go: rows of (x, shortened name)."""
    rows: list[list[tuple[float, str]]] = [[]]
    x = 0.0
    for name in names:
        label = fit(name, min(width - 20, 190), size)
        advance = 14 + text_width(label, size) + 18
        if rows[-1] and x + advance - 18 > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, label))
        x += advance
    return rows


def draw_key(canvas: Canvas, top: float, rows: Sequence[Sequence[tuple[float, str]]], fills: Iterable[str]) -> None:
    """A colour key of 18 pixels a row; where the colours start over, rings stand for dashed lines."""
    sheet = canvas.sheet(0, top)
    entries = [(r, x, label) for r, row in enumerate(rows) for x, label in row]
    for i, ((r, x, label), fill) in enumerate(zip(entries, fills, strict=True)):
        mark = sheet.dot if i < TASK_COLOURS else sheet.ring
        mark(x + 5, 18 * r + 8, fill)
        sheet.text(x + 14, 18 * r + 8, label, 11)


def panels(
    count: int, width: float, columns: int, plot_height: float, *, top: float = 0, title: float = TITLE
) -> tuple[Canvas, list[Axes]]:
    """A grid of `count` plots below `top` pixels, each with `title` pixels above it and room for tick labels."""
    gutter, foot, between = 38, 30, 18
    rows = -(-count // columns)
    canvas = Canvas(width, top + rows * (title + plot_height + foot))
    plot_width = (width - between * (columns - 1)) / columns - gutter
    grid = []
    for i in range(count):
        row, column = divmod(i, columns)
        left = column * (plot_width + gutter + between) + gutter
        axes = canvas.axes(left, top + row * (title + plot_height + foot) + title, plot_width - 4, plot_height)
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
        axes.xaxis.set_major_locator(MaxNLocator(3 if plot_width < 200 else 5, integer=True))
        grid.append(axes)
    return canvas, grid


def panel_title(
    canvas: Canvas, axes: Axes, name: str, note: str = "", fill: str | None = None, *, title: float = TITLE
) -> None:
    """A plot's title: a dot in its colour, its name, and a short note at the right or, with `TWO_LINE_TITLE`, below."""
    box = axes.get_position()
    left, width = box.x0 * canvas.width, box.width * canvas.width
    line = canvas.sheet(left, (1 - box.y1) * canvas.height - title)
    x = 0.0
    if fill is not None:
        line.dot(4, 10, fill)
        x = 13
    below = title == TWO_LINE_TITLE
    room = width - x - (text_width(note, 10.5) + 8 if note and not below else 0)
    line.text(x, 10, fit(name, room, 11.5, bold=True), 11.5, bold=True)
    if below:
        line.text(x, 25, note, 10.5, ink="muted")
    else:
        line.text(width, 10, note, 10.5, align="right", ink="muted")


def axis_name(axes: Axes, name: str) -> None:
    """Names the horizontal axis to the left of its tick labels, where it costs no height."""
    axes.annotate(
        name,
        (0, 0),
        xytext=(-8, -6),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=10,
        color=colour("muted"),
        annotation_clip=False,
    )


def scale_key(canvas: Canvas, top: float, labels: tuple[str, str, str], title: str) -> None:
    """The diverging scale with its two ends and its middle named, 32 pixels high."""
    sheet = canvas.sheet(0, top)
    start = text_width(title, 10.5) + 12
    sheet.text(0, 7, title, 10.5, ink="muted")
    length = min(230.0, canvas.width - start)
    for level in range(LEVELS):  # each box reaches to the end and the next one covers the rest: no seams
        x = level * length / LEVELS
        sheet.box(start + x, 1, length - x, 11, scale_colour(2 * level / (LEVELS - 1) - 1))
    for x, label, side in zip((0, length / 2, length), labels, ("left", "center", "right"), strict=True):
        sheet.text(start + x, 22, label, 10, align=side, ink="muted")
