"""The report's colours and type: one table, so that page and figures agree in light, in dark and in print.

Figures are drawn in the light colours. When a figure is put into the page, every light colour becomes the CSS variable
of the same name, so that one drawing follows the reader's light or dark setting. That works only while the light
colours are all different from each other, which the tests check.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.colors import LinearSegmentedColormap, to_hex

LEVELS = 61
"""Steps of the diverging scale, odd so that one of them is the exact middle."""

_COOL_TO_WARM_LIGHT = ["#19497e", "#86aed3", "#f3f2ee", "#e3a165", "#823505"]
_COOL_TO_WARM_DARK = ["#86c0f2", "#2f5c88", "#20272d", "#7d4b20", "#f6b075"]

# Found by a search that kept every pair apart with protanopia, deuteranopia and tritanopia, in both settings.
_TASKS_LIGHT = ["#1f45b2", "#e96c50", "#4ba480", "#b81467", "#a56400", "#9689d8", "#2776a6", "#853b00"]
_TASKS_DARK = ["#298dfa", "#e76a8b", "#46912f", "#c55bb3", "#f6d064", "#b899db", "#7be1f7", "#eda086"]


# How far out text of the other kind begins to read better, on both sides: first in the dark setting, then in the light.
_TURNING, _STRONG = 0.62, 0.75


def _levels(anchors: list[str]) -> list[str]:
    scale = LinearSegmentedColormap.from_list("scale", anchors)
    return [to_hex(scale(i / (LEVELS - 1))) for i in range(LEVELS)]


_SCALE_LIGHT, _SCALE_DARK = _levels(_COOL_TO_WARM_LIGHT), _levels(_COOL_TO_WARM_DARK)

COLOURS: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#14181c"),
    "panel": ("#f6f7f7", "#1b2025"),
    "ink": ("#1f2a33", "#e4e9ed"),
    "muted": ("#5c6872", "#9caab5"),
    "line": ("#c3cad0", "#4a555f"),
    "grid": ("#e6eaec", "#272e35"),
    "before": ("#a3adb5", "#66727d"),
    "empty": ("#eceef0", "#252b31"),
    "weak": ("#0b1014", "#f6f9fb"),  # text on the middle of the scale
    "turning": ("#0b1015", "#0a0d0e"),  # where dark cells are already bright, but light cells not yet dark
    "strong": ("#fffffe", "#0a0d0f"),  # text on its far ends; one off white, so that it differs from paper
    "accent": ("#0b6b6f", "#5cc4c2"),
    **{f"task-{i}": pair for i, pair in enumerate(zip(_TASKS_LIGHT, _TASKS_DARK, strict=True))},
    **{f"scale-{i}": pair for i, pair in enumerate(zip(_SCALE_LIGHT, _SCALE_DARK, strict=True))},
}
"""Name -> (light, dark), as `#rrggbb`."""

VARIABLE_OF = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}
TASK_COLOURS = len(_TASKS_LIGHT)


def colour(name: str) -> str:
    """The light colour that figures are drawn with."""
    return COLOURS[name][0]


def task_colour_names(tasks: Iterable[str]) -> dict[str, str]:
    """The colour name of each task, by position; the ninth task starts over."""
    return {task: f"task-{i % TASK_COLOURS}" for i, task in enumerate(tasks)}


def task_fills(tasks: Iterable[str]) -> dict[str, str]:
    """The colour that each task is drawn with."""
    return {task: colour(name) for task, name in task_colour_names(tasks).items()}


def _level(value: float) -> int:
    return round((min(max(value, -1.0), 1.0) + 1) / 2 * (LEVELS - 1))


def scale_colour(value: float) -> str:
    """The diverging scale at `value`, which is clipped to [-1, 1]; 0 is the pale middle."""
    return colour(f"scale-{_level(value)}")


def text_on_scale(value: float) -> str:
    """Name of the text colour that can be read on `scale_colour(value)`."""
    out = abs(2 * _level(value) / (LEVELS - 1) - 1)  # of the cell's colour, which is a step of the scale
    return "strong" if out > _STRONG else "turning" if out > _TURNING else "weak"


def css_variables(dark: bool) -> str:
    """The body of a CSS rule that sets every colour."""
    return "".join(f"--{name}:{pair[dark]};" for name, pair in COLOURS.items())


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings while a figure is drawn and saved; the caller's own settings come back afterwards."""
    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 11.0,
        "text.color": colour("ink"),
        "text.parse_math": False,  # a task may be called "$5 notes"
        "axes.edgecolor": colour("line"),
        "axes.facecolor": "none",
        "axes.labelcolor": colour("muted"),
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "axes.unicode_minus": True,
        "xtick.color": colour("line"),
        "ytick.color": colour("line"),
        "xtick.labelcolor": colour("muted"),
        "ytick.labelcolor": colour("muted"),
        "xtick.labelsize": 10.0,
        "ytick.labelsize": 10.0,
        "xtick.major.size": 3.0,
        "ytick.major.size": 0.0,
        "grid.color": colour("grid"),
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "figure.facecolor": colour("paper"),
        "savefig.facecolor": "auto",
        "svg.fonttype": "none",  # real text: small, searchable, and in the page's own font
        "svg.hashsalt": "headwater",  # the same run gives the same file
    }
    with mpl.rc_context(settings):
        yield
