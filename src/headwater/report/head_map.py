"""Heads over training as a map: t-SNE of the checkpoints that a run kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from headwater.report.modules import Array, arrange

MOST_STEPS = 6
"""Checkpoints that are drawn, evenly chosen; the last one always is."""

MOST_POINTS = 1200
"""Heads that are drawn; of more layers, evenly chosen ones are."""


def heads_over_steps(run: Path) -> tuple[str, dict[int, Array]]:
    """The heads of one projection in a run's checkpoints.

    It is the projection with the most layers, of equals the last by name. Read are the up-projections of methods that
    keep them as one tensor `B` `[heads, ...]`, as the multi-head methods do.

    Returns:
        Its name, and step -> `[layers, heads, values]`, layers left out where there would be too many points. Empty
        with fewer than two checkpoints, or without heads.
    """
    from safetensors import safe_open

    steps = {
        int(path.name[11:]): path / "adapter_model.safetensors"
        for path in run.glob("checkpoint-*")
        if path.name[11:].isdecimal() and (path / "adapter_model.safetensors").is_file()
    }
    order = sorted(steps)
    if len(order) < 2:
        return "", {}
    chosen = sorted({order[round(i)] for i in np.linspace(0, len(order) - 1, MOST_STEPS)})
    found: dict[int, Array] = {}
    name = ""
    keys: list[str] = []
    for step in chosen:
        with safe_open(steps[step], "pt") as file:  # numpy knows no bfloat16
            if not keys:
                shapes = {k: file.get_slice(k).get_shape() for k in file.keys() if k.endswith("_branch.B")}  # noqa: SIM118
                held = {
                    k.rpartition(".")[0].rpartition(".")[0]: k for k, s in shapes.items() if len(s) == 3 and s[0] > 1
                }
                kinds = arrange(held)
                if not kinds:
                    return "", {}
                name = max(kinds, key=lambda kind: (len(kinds[kind]), kind))
                same = shapes[held[next(iter(kinds[name].values()))]]
                every = [held[module] for module in kinds[name].values() if shapes[held[module]] == same]
                layers = min(len(every), max(MOST_POINTS // (same[0] * len(chosen)), 1))
                keys = [every[round(i)] for i in np.linspace(0, len(every) - 1, layers)]
            found[step] = np.stack([file.get_tensor(key).flatten(1).float().numpy() for key in keys])
    return name, found


def tsne(heads: dict[int, Array]) -> Array:
    """Places of all heads in the plane, `[steps, layers, heads, 2]`: t-SNE on cosine distance, with a fixed seed.

    Args:
        heads: step -> `[layers, heads, values]`.

    Raises:
        ImportError: without scikit-learn.
    """
    from sklearn.manifold import TSNE

    stacked = np.stack(list(heads.values()))
    flat = stacked.reshape(-1, stacked.shape[-1])
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-30)
    distance = np.clip(1 - unit @ unit.T, 0, 2)
    np.fill_diagonal(distance, 0)
    perplexity = min(30.0, (len(flat) - 1) / 3)
    model = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=0)
    return model.fit_transform(distance).reshape(*stacked.shape[:-1], 2)
