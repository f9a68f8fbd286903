"""What a report says about the heads and the router."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from headwater.analysis import DEAD_BELOW
from headwater.report import head_figures
from headwater.report.comparison_figures import Line, Panel, method_curves
from headwater.report.html import Block, FigureBlock, Note, Section, Text
from headwater.report.modules import arrange, layers_of, routing_arrays, similarity_table, square
from headwater.report.run import Gates, Run, finite
from headwater.report.text import missing_text, names_text, percent_text
from headwater.report.theme import task_fills


def similarity_section(run: Run) -> Section:
    """How alike the heads are: a map over projections and layers, and a few matrices in full."""
    anchor, title = "similarity", "How alike the heads are"
    if run.analysis is None:
        return Section(anchor, title, [Note(missing_text(run, "analysis.json", "the heads"))])
    matrices = {m: v for m, v in run.analysis.head_similarity.items() if (a := square(v)) is not None and len(a) > 1}
    if not matrices:
        return Section(anchor, title, [Note("This run's adapter has no layer with more than one head to compare.")])
    table = similarity_table(matrices)
    layers = layers_of(table)
    heads = max(len(v) for v in matrices.values())
    means = {p: [v for v in row.values() if v is not None] for p, row in table.items()}
    summary = "; ".join(
        f"{p} {np.mean(v):.2f} (layers {min(v):.2f} to {max(v):.2f})".replace("-", "−") for p, v in means.items() if v
    )
    text = (
        f"Cosine between the up-projections of every two of the {heads} heads, averaged per layer: 1 means that the "
        "heads have become one, 0 that they have nothing in common. "
        f"Mean over layers: {summary or 'no finite value'}."
    )
    picked = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    arrays = {
        projection: {k: a for k, m in row.items() if k in picked and (a := square(matrices[m])) is not None}
        for projection, row in arrange(matrices).items()
    }
    places = ", ".join(map(str, picked))
    blocks: list[Block] = [
        Text(text),
        FigureBlock(
            "head_similarity",
            "Mean cosine between different heads, by projection and layer. The scale is the same in every report.",
            f"Heat map of the mean cosine between different heads. Mean over layers: {summary}.",
            lambda w: head_figures.head_similarity(table, layers, w),
        ),
        FigureBlock(
            "head_matrices",
            f"Cosine of every pair of heads in layers {places}.",
            f"Matrices of the cosine of every pair of heads in layers {places}.",
            lambda w: head_figures.head_matrices(arrays, picked, w),
        ),
        *_over_training(run),
    ]
    return Section(anchor, title, blocks)


def _over_training(run: Run) -> list[Block]:
    read = {"heads": lambda r: r.head_similarity, "what they learnt": lambda r: r.head_update_similarity}
    lines = []
    for label, value in read.items():
        series = {r.step: v for r in run.train if (v := finite(value(r))) is not None}
        if len(series) > 1:
            lines.append(Line(label, list(series), list(series.values())))
    if not lines:
        return []
    caption = (
        "Mean cosine between different heads over training steps: of the up-projections as they are, and of what "
        "training has added to each. Heads that start at random are unlike before they have learnt anything."
    )
    fills = task_fills(list(read))
    draw = lambda w: method_curves([Panel("", lines)], fills, w)  # noqa: E731
    return [FigureBlock("head_diversity", caption, "Mean cosine between heads over steps.", draw)]


def routing_section(run: Run) -> Section:
    """Which task uses which head: shares over all layers, by layer, and how far the tasks are apart."""
    anchor, title = "routing", "Which task uses which head"
    if run.analysis is None:
        return Section(anchor, title, [Note(missing_text(run, "analysis.json", "the router"))])
    arrays = {p: a for p, a in routing_arrays(run.analysis.routing).items() if np.isfinite(a[2]).any()}
    if not arrays:
        return Section(anchor, title, [Note("This run's adapter has no router.")])
    fills = task_fills(run.tasks)
    heads = max(shares.shape[2] for _, _, shares in arrays.values())
    tasks = next(iter(arrays.values()))[1]
    share = percent_text(1 / heads)
    by_projection = head_figures.plots_by_projection(arrays)
    blocks: list[Block] = [
        *([Text(_load_text(run.analysis.gates))] if run.analysis.gates else []),
        FigureBlock(
            "router_use",
            "Mean share of each head in percent, over the layers and over the task's tokens without padding. "
            f"Equal shares would be {share}; the colour shows the factor from there.",
            f"Tables of the share of each of {heads} heads per task.",
            lambda w: head_figures.router_use(arrays, fills, w),
        ),
        FigureBlock(
            "router_by_layer",
            f"The same layer by layer{'' if by_projection else ', averaged over projections'}. "
            f"Dashed: equal shares, {share}.",
            f"Lines of the share of each head over layers, for {names_text(tasks)}.",
            lambda w: head_figures.router_by_layer(arrays, fills, w),
        ),
    ]
    if len(tasks) > 1:
        caption = (
            "How far each task's shares are from the mean over tasks, as total variation: 0 if the router treats the "
            "task like the others, towards 1 the fewer heads it shares with them."
        )
        alt = "Lines of the distance between each task's head shares and the mean over tasks, over layers."
        draw = lambda w: head_figures.router_distance(arrays, fills, w)  # noqa: E731
        blocks.append(FigureBlock("router_distance", caption, alt, draw))
    return Section(anchor, title, blocks)


def _load_text(gates: Mapping[str, Gates]) -> str:
    """Entropies and dead heads over all tasks' tokens, in words."""
    sentences = []
    for name, values in (
        ("Entropy of a token's gate", [finite(g.gate_entropy) for g in gates.values()]),
        ("entropy of the heads' load", [finite(g.load_entropy) for g in gates.values()]),
    ):
        known = [v for v in values if v is not None]
        if known:
            sentences.append(f"{name}: {np.mean(known):.2f} (layers {min(known):.2f} to {max(known):.2f})")
    entropies = f"{'; '.join(sentences)}; 1 is equal use of all heads, 0 of one alone. " if sentences else ""
    dead = {module: g.dead_experts for module, g in gates.items() if g.dead_experts}
    count, heads = sum(map(len, dead.values())), sum(len(g.load) for g in gates.values())
    if not dead:
        return f"{entropies}No head is dead (load below {percent_text(DEAD_BELOW)} of an equal one)."
    places = [
        f"{projection} of layer {layer}: {', '.join(str(n + 1) for n in dead[module])}"
        for projection, layers in arrange(dead).items()
        for layer, module in layers.items()
    ]
    rest = f"; and {len(places) - 6} more layers" if len(places) > 6 else ""
    share = f"load below {percent_text(DEAD_BELOW)} of an equal one"
    return f"{entropies}{count} of {heads} heads are dead ({share}): {'; '.join(places[:6])}{rest}."
