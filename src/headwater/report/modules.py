"""From values per module name to values per projection and layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

Array = np.ndarray

_LAYER = re.compile(r"^(?P<before>.*?)\.?(?<![^.])(?P<layer>\d+)\.(?P<rest>.+)$")


def arrange(modules: Iterable[str]) -> dict[str, dict[int, str]]:
    """Projection -> layer -> module name, layers rising.

    The first number in a module's name is its layer, what follows is its projection: `model.layers.3.mlp.up_proj` is
    layer 3 of `up_proj`. Where two projections end alike the name is kept longer. A module without a number is layer 0
    of itself.
    """
    places: dict[str, tuple[str, str, int]] = {}
    for module in modules:
        match = _LAYER.match(module)
        if match is None:
            places[module] = ("", module, 0)
        else:
            places[module] = (match["before"], match["rest"], int(match["layer"]))
    kinds = {(before, rest) for before, rest, _ in places.values()}
    short = Counter(rest.rpartition(".")[2] for _, rest in kinds)
    middle = Counter(rest for _, rest in kinds)
    table: dict[str, dict[int, str]] = {}
    for module, (before, rest, layer) in places.items():
        last = rest.rpartition(".")[2]
        name = last if short[last] == 1 else rest if middle[rest] == 1 else f"{before}.*.{rest}"
        table.setdefault(name, {})[layer] = module
    return {name: dict(sorted(layers.items())) for name, layers in table.items()}


def layers_of(table: Mapping[str, Mapping[int, object]]) -> list[int]:
    """Every layer that any projection has, rising."""
    return sorted({layer for layers in table.values() for layer in layers})


def square(matrix: list[list[float]]) -> Array | None:
    """`matrix` as a float array [N, N], or None if it is not square or empty."""
    if not matrix or any(len(row) != len(matrix) for row in matrix):
        return None
    return np.asarray(matrix, dtype=float)


def mean_off_diagonal(matrix: list[list[float]]) -> float | None:
    """Mean cosine between different heads; None with fewer than two heads or with values that are not finite."""
    array = square(matrix)
    if array is None or len(array) < 2:
        return None
    n = len(array)
    mean = (array.sum() - np.trace(array)) / (n * (n - 1))
    return float(mean) if np.isfinite(mean) else None


def similarity_table(similarity: Mapping[str, list[list[float]]]) -> dict[str, dict[int, float | None]]:
    """Projection -> layer -> mean cosine between different heads."""
    return {
        projection: {layer: mean_off_diagonal(similarity[module]) for layer, module in layers.items()}
        for projection, layers in arrange(similarity).items()
    }


def routing_arrays(routing: Mapping[str, Mapping[str, list[float]]]) -> dict[str, tuple[list[int], list[str], Array]]:
    """Projection -> (layers, tasks, share of each head [tasks, layers, heads]); NaN where a task lacks a module."""
    modules = dict.fromkeys(module for gates in routing.values() for module in gates)
    arrays: dict[str, tuple[list[int], list[str], Array]] = {}
    for projection, layers in arrange(modules).items():
        heads = max(len(gates[module]) for gates in routing.values() for module in layers.values() if module in gates)
        if heads == 0:
            continue
        values = np.full((len(routing), len(layers), heads), np.nan)
        for t, gates in enumerate(routing.values()):
            for k, module in enumerate(layers.values()):
                gate = gates.get(module, [])
                values[t, k, : len(gate)] = gate
        arrays[projection] = (list(layers), list(routing), values)
    return arrays


def mean_over(values: Array, axis: int) -> Array:
    """Mean along `axis` over what is finite; NaN where nothing is."""
    known = np.isfinite(values)
    counts = known.sum(axis=axis)
    totals = np.where(known, values, 0.0).sum(axis=axis)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def distance_from_mean(shares: Array) -> Array:
    """Total variation between a task's head shares and the mean over tasks: 0 same, towards 1 disjoint.

    Args:
        shares: [tasks, layers, heads].

    Returns:
        [tasks, layers].
    """
    return 0.5 * np.abs(shares - mean_over(shares, 0)).sum(axis=-1)
