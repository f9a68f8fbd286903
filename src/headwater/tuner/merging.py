"""Merging what has no single weight: with its gates held fixed, or for one task."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..methods.registry import method as registered
from .layer import MethodLayer
from .model import refuse_shared


def merge_with_gates(model: nn.Module, gates: dict[str, Tensor] | str) -> nn.Module:
    """Merges a routed adapter approximately, with gates held fixed, and returns the base model.

    Warns, as the result is the adapter only where its own gates are those: what that costs, scores tell.

    Args:
        model: a `PeftModel` with a headwater adapter.
        gates: layer name -> `(N,)`, for instance the mean gate over some rows; or "uniform".

    Raises:
        HeadwaterError: if a layer has no gate or one that does not fit, or the method has no gates at all; no layer is
            merged then.
    """
    layers = _layers(model)
    ungated = {method.title for layer in layers if (method := registered(layer.method_name)).mergeable}
    if ungated:
        raise HeadwaterError(
            *(
                Problem(f"{title} has no gates to hold fixed", "gates", "model.merge_and_unload() merges it exactly")
                for title in sorted(ungated)
            )
        )
    if isinstance(gates, str):
        if gates != "uniform":
            what = f"gates are a dictionary from layer name to gate, or 'uniform', not {gates!r}"
            raise HeadwaterError(Problem(what, "gates"))
        chosen = {layer.name: _uniform_gate(layer) for layer in layers}
    else:
        chosen = gates
    missing = [layer.name for layer in layers if layer.name not in chosen]
    if missing:
        raise HeadwaterError(
            *(Problem(f"no gate for layer {name}", fix="give one for each adapted layer") for name in missing)
        )
    merged = _merge_and_unload(model, [(layer, {"gate": chosen[layer.name]}) for layer in layers])
    if any(_uniform_gate(layer).numel() > 1 for layer in layers):
        warnings.warn(
            "merged with fixed gates: that is approximate wherever the adapter's own gates are others; compare scores "
            "before and after",
            stacklevel=2,
        )
    return merged


def merge_task(model: nn.Module, task: int) -> nn.Module:
    """Merges what a task-conditioned adapter does for one task, exactly, and returns the base model.

    Raises:
        HeadwaterError: if the adapter does not know the task; no layer is merged then.
    """
    return _merge_and_unload(model, [(layer, {"task": task}) for layer in _layers(model)])


def _active(layer: MethodLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.branches]


def _layers(model: nn.Module) -> list[MethodLayer]:
    """Those that an active adapter is on."""
    return [module for module in model.modules() if isinstance(module, MethodLayer) and _active(module)]


def _uniform_gate(layer: MethodLayer) -> Tensor:
    held = layer.branch(_active(layer)[0]).heads()
    N = 1 if held is None else held.B.shape[0]
    return torch.full((N,), 1 / N)


def _merge_and_unload(model: nn.Module, how: list[tuple[MethodLayer, dict[str, Any]]]) -> nn.Module:
    for layer, fixed in how:  # a rehearsal: what would be refused is refused before the first layer is touched
        layer.merged_weight(_active(layer), **fixed)
    refuse_shared(model, [layer for layer, _ in how])
    for layer, fixed in how:
        layer.merge_with(**fixed)
    tuner: Any = getattr(model, "base_model", model)
    return tuner.unload()
