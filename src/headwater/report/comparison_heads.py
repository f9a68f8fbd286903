"""What a comparison's report says about heads and routers, from the analyses of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from headwater.report import comparison_figures, head_figures
from headwater.report.comparison import Comparison
from headwater.report.comparison_curves import panel
from headwater.report.comparison_interference import trained_on
from headwater.report.head_map import heads_over_steps, tsne
from headwater.report.html import FigureBlock, Note, Section, Text
from headwater.report.modules import Array, layers_of, mean_off_diagonal, mean_over, routing_arrays, similarity_table
from headwater.report.run import Run
from headwater.report.text import names_text
from headwater.report.theme import task_fills

MOST_HEADS = 16
"""Routers with more heads than this (a rank each, say) are left out: their shares would not be readable."""


def mean_similarity(run: Run | None) -> float | None:
    """Mean cosine between different heads over a trained adapter's layers; None without heads or without the folder."""
    matrices = run.analysis.head_similarity if run and run.analysis else {}
    known = [value for matrix in matrices.values() if (value := mean_off_diagonal(matrix)) is not None]
    return float(np.mean(known)) if known else None


def heads_sections(comparison: Comparison) -> list[Section]:
    """How alike each method's heads are, and which task uses which head; those that no method has anything for, not."""
    sections = (_similarity(comparison), _diversity_and_score(comparison), _routing(comparison))
    return [section for section in sections if section is not None]


def diversity_and_score(comparison: Comparison) -> dict[str, list[tuple[float, float]]]:
    """Label -> for each of its runs (mean cosine between heads after training, mean score).

    Only of methods with heads that were trained on the same tasks as the first one.
    """
    tasks = trained_on(comparison, comparison.labels[0])
    points: dict[str, list[tuple[float, float]]] = {}
    for label in comparison.labels:
        if trained_on(comparison, label) != tasks:
            continue
        for run in comparison.runs[label]:
            alike, score = mean_similarity(run), run.results.mean.after if run.results else None
            if alike is not None and score is not None:
                points.setdefault(label, []).append((alike, score))
    return points


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None with fewer than three pairs or where one
    side is constant."""
    if len(pairs) < 3:
        return None
    ranks = []
    for values in zip(*pairs, strict=True):
        array = np.asarray(values)
        below, equal = (array[:, None] > array).sum(1), (array[:, None] == array).sum(1)
        ranks.append(below + (equal - 1) / 2)
    x, y = (r - r.mean() for r in ranks)
    length = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / length if length else None


def correlations(points: Mapping[str, Sequence[tuple[float, float]]]) -> tuple[float | None, float | None]:
    """`rank_correlation` over all runs of `diversity_and_score`, and over the means of its methods."""
    runs = [pair for group in points.values() for pair in group]
    means = [(sum(x) / len(x), sum(y) / len(y)) for x, y in (zip(*group, strict=True) for group in points.values())]
    return rank_correlation(runs), rank_correlation(means)


def _diversity_and_score(comparison: Comparison) -> Section | None:
    points = diversity_and_score(comparison)
    rho, middle = correlations(points)
    if rho is None:
        return None
    fills = task_fills(comparison.labels)
    said = f"Spearman's rank correlation over all {sum(map(len, points.values()))} runs is {rho:+.2f}".replace("-", "−")
    if middle is not None:
        said += f", over the means of the {len(points)} methods {middle:+.2f}".replace("-", "−")
    text = (
        f"{said}. Below 0, heads that differ more go with higher scores. Methods differ in more than their heads, so "
        "this is no proof that the one makes the other."
    )
    figure = FigureBlock(
        "diversity_score",
        "Mean score of each run against the mean cosine between its heads after training.",
        f"Points of head similarity and score of {names_text(list(points))}.",
        lambda w: comparison_figures.scatter(points, fills, w, ("mean cosine between heads", "mean score")),
    )
    return Section("diversity", "Does diversity go with the score", [Text(text), figure])


def _similarity(comparison: Comparison) -> Section | None:
    table: dict[str, dict[int, float | None]] = {}
    for label, runs in comparison.runs.items():
        by_layer: dict[int, list[float]] = {}
        for run in runs:
            matrices = run.analysis.head_similarity if run.analysis else {}
            heads = {m: v for m, v in matrices.items() if mean_off_diagonal(v) is not None}
            for row in similarity_table(heads).values():
                for layer, value in row.items():
                    if value is not None:
                        by_layer.setdefault(layer, []).append(value)
        if by_layer:
            table[label] = {layer: float(np.mean(by_layer[layer])) for layer in sorted(by_layer)}
    if not table:
        return None
    found = {label: f"{np.mean(list(row.values())):.2f}".replace("-", "−") for label, row in table.items()}
    means = "; ".join(f"{label} {mean}" for label, mean in found.items())
    text = (
        "Cosine between the up-projections of every two heads, averaged over pairs, projections and seeds: 1 means "
        f"that the heads have become one, 0 that they have nothing in common. Mean over layers: {means}. "
        "Whether heads that differ score higher is another question, which the table at the top answers."
    )
    layers = layers_of(table)
    figure = FigureBlock(
        "head_similarity",
        "Mean cosine between different heads after training, by method and layer.",
        f"Heat map of the mean cosine between heads: {means}.",
        lambda w: head_figures.head_similarity(table, layers, w),
    )
    return Section(
        "similarity", "How alike the heads are", [Text(text), figure, *_over_training(comparison), *_maps(comparison)]
    )


def _maps(comparison: Comparison) -> list[FigureBlock | Note]:
    """A map of each method's heads over the checkpoints that its first run kept."""
    blocks: list[FigureBlock | Note] = []
    for label, folders in comparison.folders.items():
        name, heads = heads_over_steps(folders[0])
        if not heads:
            continue
        try:
            places = tsne(heads)
        except ImportError:
            return [Note("Maps of the heads need scikit-learn: pip install 'headwater[heads]'.")]
        steps = list(heads)
        fills = task_fills([f"head {n + 1}" for n in range(places.shape[2])])
        caption = (
            f"{label}: t-SNE, by cosine distance, of the heads of {name} in {len(places[0])} layers, at steps "
            f"{', '.join(map(str, steps))} of the first seed's run; later steps are larger and darker, and a line "
            "joins a layer's head over steps. Distances between far groups mean nothing."
        )
        alt = f"Map of the heads of {label} over training."
        draw = lambda w, places=places, fills=fills: head_figures.head_map(places, fills, w)  # noqa: E731
        blocks.append(FigureBlock(f"head_map_{len(blocks) + 1}", caption, alt, draw))
    return blocks


def _over_training(comparison: Comparison) -> list[FigureBlock]:
    """How alike heads are over steps, where the histories say it."""
    panels = [
        panel(comparison, "heads", lambda run: {r.step: r.head_similarity for r in run.train}, smooth=False),
        panel(comparison, "what they learnt", lambda run: {r.step: r.head_update_similarity for r in run.train},
              smooth=False),
    ]  # fmt: skip
    panels = [p for p in panels if p.lines]
    if not panels:
        return []
    fills = task_fills(comparison.labels)
    caption = (
        "Mean cosine between different heads over training steps, mean over seeds. Left: of the up-projections as they "
        "are. Right: of what training has added to each; heads that start at random are unlike before they have learnt "
        "anything, so only this one says whether they learn different things."
    )
    alt = f"Mean cosine between heads over steps, of {names_text([line.label for line in panels[0].lines])}."
    return [FigureBlock("head_diversity", caption, alt, lambda w: comparison_figures.method_curves(panels, fills, w))]


def _routing(comparison: Comparison) -> Section | None:
    rows: dict[str, dict[str, Array]] = {}
    left_out = []
    for label, runs in comparison.runs.items():
        found = routing_arrays(runs[0].analysis.routing) if runs and runs[0].analysis else {}
        shares = [values for _, _, values in found.values() if np.isfinite(values).any()]
        if not shares:
            continue
        heads = max(values.shape[2] for values in shares)
        if heads > MOST_HEADS:
            left_out.append(label)
            continue
        # One number per task and head: over layers here, as each projection may have its own, and heads of its own.
        alike = [np.pad(v, ((0, 0), (0, 0), (0, heads - v.shape[2])), constant_values=np.nan) for v in shares]
        flat = mean_over(np.stack([mean_over(values, 1) for values in alike]), 0)
        rows[label] = dict(zip(next(iter(found.values()))[1], flat, strict=True))
    if not rows:
        return None
    # Tasks that are only trained on have no scores, and a method may have tasks of its own.
    tasks = list(dict.fromkeys([*comparison.tasks, *(task for known in rows.values() for task in known)]))
    arrays: dict[str, tuple[list[int], list[str], Array]] = {}
    for label, known in rows.items():
        absent = np.full_like(next(iter(known.values())), np.nan)
        arrays[label] = ([0], tasks, np.stack([known.get(task, absent) for task in tasks])[:, None, :])
    fills = task_fills(tasks)
    more = f" Left out, with more than {MOST_HEADS} heads: {names_text(left_out)}." if left_out else ""
    figure = FigureBlock(
        "router_use",
        "Mean share of each head in percent, over layers, projections and the task's tokens, in the run with the first "
        f"seed. Heads of different seeds have no common order, so there is no mean over seeds.{more}",
        f"Tables of the share of each head per task, for {names_text(list(arrays))}.",
        lambda w: head_figures.router_use(arrays, fills, w),
    )
    return Section("routing", "Which task uses which head", [figure])
