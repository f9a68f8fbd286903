"""Figures show the numbers they are given."""

from __future__ import annotations

import math
import re
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from headwater.report import figures, head_figures, theme
from headwater.report.html import svg_bytes
from headwater.report.layout import NARROW, WIDE, fit, key_rows, text_width

WIDTHS = pytest.mark.parametrize("width", [WIDE, NARROW])
ORANGE, BLUE = theme.colour("task-4"), theme.colour("task-0")


@pytest.fixture(autouse=True)
def _style():
    with theme.style():
        yield


def lines(axes):
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in axes.lines]


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")) if text.get_text()]


def cells(figure):
    """Colours of the heat map's cells, without those of the scale's key."""
    return [to_hex(p.get_facecolor()) for p in figure.artists if isinstance(p, Rectangle)][theme.LEVELS :]


@WIDTHS
def test_bars_are_as_long_as_their_values(width):
    bars = [figures.Bar("before", 0.25, BLUE, (0.2, 0.31)), figures.Bar("after", 0.75, ORANGE)]
    group = figures.BarGroup("a task", ORANGE, bars, "n = 40", mark=0.5, mark_note="majority 0.500")
    figure = figures.grouped_bars([group], width)
    (axes,) = figure.axes
    assert axes.get_xlim() == (0.0, 1.0)
    assert [(p.get_x(), p.get_width(), to_hex(p.get_facecolor())) for p in axes.patches] == [
        (0, 0.25, BLUE),
        (0, 0.75, ORANGE),
    ]
    spans = {tuple(sorted(set(x))) for x, _ in lines(axes)}
    assert spans == {(0.5,), (0.2, 0.31), (0.2,), (0.31,)}  # the mark, the whisker and its two ends
    assert {"a task", "n = 40", "majority 0.500", "0.250", "0.750"} <= set(texts(figure))


def test_text_and_bars_stay_in_line_in_the_file():
    figure = figures.grouped_bars([figures.BarGroup("t", BLUE, [figures.Bar("after", 0.75, ORANGE)])], WIDE)
    svg = svg_bytes(figure).decode()
    path = re.search(rf'<path d="([^"]*)"[^>]*style="fill: {ORANGE}', svg)[1]
    heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
    text = float(re.search(r'<text[^>]* y="([\d.]+)"[^>]*>0.750', svg)[1])
    assert min(heights) < text < max(heights) + 2  # the text's baseline may be a little below the bar


def test_a_bar_without_a_value_says_so():
    figure = figures.grouped_bars([figures.BarGroup("t", BLUE, [figures.Bar("after", None, BLUE)])], WIDE)
    assert not figure.axes[0].patches
    assert "no value" in texts(figure)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(0, 7).map(lambda k: 2 * k + 1))
def test_running_mean_is_the_mean_of_the_neighbours(values, window):
    means = figures.running_mean(values, window)
    assert len(means) == len(values)
    inner = np.convolve(values, np.ones(window) / window, mode="valid")
    if len(values) >= window:
        np.testing.assert_allclose(means[window // 2 : len(values) - window // 2], inner, rtol=1e-9, atol=1e-3)
    assert all(min(values) - 1e-6 <= m <= max(values) + 1e-6 for m in means)


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), max_size=3000), st.integers(10, 500))
def test_thinning_keeps_the_peaks(values, most):
    steps, kept = figures.thin(range(len(values)), values, most)
    assert len(kept) <= max(most + 2, 0)
    assert steps == sorted(set(steps))
    assert [values[s] for s in steps] == kept
    if values:
        assert (min(kept), max(kept)) == (min(values), max(values))


@WIDTHS
def test_losses_are_drawn_raw_and_smoothed_and_crossed_out_where_not_finite(width):
    values = [3.0 - 0.02 * i + (-1) ** i for i in range(100)]
    values[40] = math.inf
    curve = figures.Curve("a task", BLUE, range(1, 101), values)
    figure = figures.training_loss([curve], width)
    raw, smooth, crosses = lines(figure.axes[0])
    finite = [v for v in values if math.isfinite(v)]
    assert raw[1] == finite
    assert smooth[1] == pytest.approx(figures.running_mean(finite, 7))
    assert crosses[0] == [41.0]
    assert figure.axes[0].get_ylim()[1] >= max(finite)
    assert f"{smooth[1][0]:.2f} → {smooth[1][-1]:.2f}" in texts(figure)


def test_one_loss_and_no_loss_can_be_drawn():
    curves = [figures.Curve("one", BLUE, [5], [1.5]), figures.Curve("none", BLUE, [1, 2], [None, math.nan])]
    figure = figures.training_loss(curves, WIDE)
    assert "no values" in texts(figure)


@WIDTHS
def test_scores_over_steps_have_bands_rings_and_the_level(width):
    curve = figures.Curve(
        "t", BLUE, [0, 5, 10], [0.2, math.nan, 0.6], [(0.1, 0.3), None, (0.5, 0.7)], 0.4, [0], top=1.0
    )
    (axes,) = figures.evaluation([curve], width).axes
    line, points, rings, level = lines(axes)
    assert line == ([0.0, 10.0], [0.2, 0.6])
    assert points == ([10.0], [0.6])
    assert rings == ([0.0], [0.2])
    assert set(level[1]) == {0.4}
    assert axes.get_ylim() == (0.0, 1.0)
    (band,) = axes.collections
    assert {tuple(v) for v in band.get_paths()[0].vertices} >= {(0, 0.1), (0, 0.3), (10, 0.5), (10, 0.7)}


@WIDTHS
def test_similarity_cells_have_the_colour_and_the_number_of_their_value(width):
    table = {"up": {0: 0.8, 1: -0.4}, "down": {0: 0.0, 2: None}}
    figure = head_figures.head_similarity(table, [0, 1, 2], width)
    expected = [0.8, -0.4, None, 0.2, 0.0, None, None, 0.0]  # up and its mean, then down and its mean
    empty = theme.colour("empty")
    assert cells(figure) == [empty if v is None else theme.scale_colour(v) for v in expected]
    assert {".80", "−.40", ".20", ".00", "–"} <= set(texts(figure))


@WIDTHS
def test_matrices_leave_their_diagonal_empty(width):
    matrix = np.array([[1.0, 0.5], [-0.5, 1.0]])
    figure = head_figures.head_matrices({"up": {0: matrix}}, [0], width)
    empty = theme.colour("empty")
    assert cells(figure) == [empty, theme.scale_colour(0.5), theme.scale_colour(-0.5), empty]


@WIDTHS
def test_router_use_is_coloured_by_the_factor_from_equal_shares(width):
    shares = np.array([[[0.4, 0.6], [0.6, 0.4]], [[0.25, 0.75], [0.25, 0.75]]])  # tasks, layers, heads
    figure = head_figures.router_use({"up": ([0, 1], ["a", "b"], shares)}, {"a": BLUE, "b": ORANGE}, width)
    assert {"50", "25", "75"} <= set(texts(figure))
    expected = [0.0, 0.0, -1.0, math.log2(1.5)]
    assert cells(figure) == [theme.scale_colour(v) for v in expected]


@WIDTHS
def test_router_lines_are_the_shares_in_the_tasks_colours(width):
    shares = np.array([[[0.4, 0.6], [0.7, 0.3]], [[0.25, 0.75], [0.2, 0.8]]])
    routing = {"up": ([3, 5], ["a", "b"], shares)}
    figure = head_figures.router_by_layer(routing, {"a": BLUE, "b": ORANGE}, width)
    first = [line for line in figure.axes[0].lines if line.get_color() in (BLUE, ORANGE)]
    assert [(line.get_color(), list(line.get_xdata()), list(line.get_ydata())) for line in first] == [
        (BLUE, [3, 5], [0.4, 0.7]),
        (ORANGE, [3, 5], [0.25, 0.2]),
    ]
    assert len(figure.axes) == 2


@WIDTHS
@pytest.mark.parametrize(("tasks", "heads", "projections", "layers"), [(1, 2, 1, 1), (12, 10, 7, 3), (3, 24, 1, 40)])
def test_any_number_of_tasks_heads_projections_and_layers_stays_inside(width, tasks, heads, projections, layers):
    names = [f"task {t}" for t in range(tasks)]
    fills = theme.task_fills(names)
    shares = np.full((tasks, layers, heads), 1 / heads)
    routing = {f"projection_{p}": (list(range(layers)), names, shares) for p in range(projections)}
    table = {p: dict.fromkeys(range(layers), -0.123) for p in routing}
    matrices = {p: {0: np.full((heads, heads), -0.123)} for p in routing}
    drawn = [
        head_figures.router_use(routing, fills, width),
        head_figures.router_by_layer(routing, fills, width),
        head_figures.router_distance(routing, fills, width),
        head_figures.head_similarity(table, range(layers), width),
        head_figures.head_matrices(matrices, [0, layers + 1], width),
    ]
    for figure in drawn:
        figure.savefig(BytesIO(), format="svg")
        frame, renderer = figure.bbox, FigureCanvasAgg(figure).get_renderer()
        for text in figure.texts:
            box = text.get_window_extent(renderer)
            # Two pixels of grace: the text is measured with its full height.
            assert frame.x0 - 2 <= box.x0 <= box.x1 <= frame.x1 + 2, text.get_text()
            assert frame.y0 - 2 <= box.y0 <= box.y1 <= frame.y1 + 2, text.get_text()


@settings(deadline=None)
@given(st.text(max_size=80), st.floats(30, 300))
def test_fitted_text_fits_and_keeps_both_ends(text, width):
    fitted = fit(text, width, 11)
    assert fitted == " ".join(text.split()) or (text_width(fitted, 11) <= width and "…" in fitted)


def test_names_that_begin_alike_stay_different():
    long = "the_same_beginning_of_a_long_name_"
    assert fit(long + "one", 120, 11) != fit(long + "two", 120, 11)


def test_key_wraps_and_keeps_every_name():
    names = [f"task number {i}" for i in range(20)]
    rows = key_rows(names, NARROW)
    assert [label for row in rows for _, label in row] == names
    assert all(x + 14 + text_width(label, 11) <= NARROW for row in rows for x, label in row)
    assert len(rows) > 5
