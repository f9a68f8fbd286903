"""Merging what has no single weight: with its gates held fixed, or for one task."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..methods.base import Branch, MethodConfig
from ..methods.registry import method as registered
from .layer import MethodLayer
from .model import MethodModel, refuse_shared


def merge_with_gates(model: nn.Module, gates: Mapping[str, Any] | str) -> nn.Module:
    """Merges a routed adapter approximately, with gates held fixed, and returns the base model.

    Warns, as the result is the adapter only where its own gates are those: what that costs, scores tell.

    Args:
        model: a `PeftModel` with a headwater adapter.
        gates: layer name -> `(N,)`, for instance the mean gate over some rows; or "uniform".

    Raises:
        HeadwaterError: if no headwater adapter is active, a layer has no gate or one that does not fit, a gate is for
            no layer, or the method has no gates at all; no layer is merged then.
    """
    tuner, layers = _to_merge(model)
    ungated = {method.title for layer in layers if (method := registered(layer.method_name)).mergeable}
    if ungated:
        raise HeadwaterError(
            *(
                Problem(f"{title} has no gates to hold fixed", "gates", "model.merge_and_unload() merges it exactly")
                for title in sorted(ungated)
            )
        )
    if isinstance(gates, str) and gates == "uniform":
        chosen = {layer.name: uniform_gate(layer.branch(_active(layer)[0])) for layer in layers}
    elif isinstance(gates, Mapping):
        chosen = _gates_of(gates, [layer.name for layer in layers])
    else:
        what = f"gates are a dictionary from layer name to gate, or 'uniform', not {gates!r}"
        raise HeadwaterError(Problem(what, "gates"))
    merged = _merge_and_unload(model, tuner, [(layer, {"gate": chosen[layer.name]}) for layer in layers])
    if any(uniform_gate(layer.branch(_active(layer)[0])).numel() > 1 for layer in layers):
        warnings.warn(
            "merged with fixed gates: that is approximate wherever the adapter's own gates are others; compare scores "
            "before and after",
            stacklevel=2,
        )
    return merged


def merge_task(model: nn.Module, task: int) -> nn.Module:
    """Merges what a task-conditioned adapter does for one task, exactly, and returns the base model.

    Raises:
        HeadwaterError: if no headwater adapter is active, or it does not know the task, as one whose method has no
            tasks knows none; no layer is merged then.
    """
    tuner, layers = _to_merge(model)
    configs = [tuner.peft_config[name] for name in {name for layer in layers for name in _active(layer)}]
    if not any(isinstance(config, MethodConfig) and config.needs_task_ids for config in configs):
        how = "model.merge_and_unload()" if tuner.method.mergeable else "headwater.merge_with_gates(model, gates)"
        what = f"this {tuner.method.title} adapter does the same for every task"
        raise HeadwaterError(Problem(what, "task", f"{how} merges it"))
    return _merge_and_unload(model, tuner, [(layer, {"task": task}) for layer in layers])


def _to_merge(model: nn.Module) -> tuple[MethodModel, list[MethodLayer]]:
    """The tuner, which takes the merged layers out again, and the layers that an active adapter is on. Asked for before
    the first layer is merged."""
    layers = [module for module in model.modules() if isinstance(module, MethodLayer) and _active(module)]
    if not layers:
        raise HeadwaterError(
            Problem(
                "this model has no active headwater adapter to merge",
                fix="make one active with model.set_adapter(name); PEFT's own adapters merge with "
                "model.merge_and_unload()",
            )
        )
    # not `model.base_model` alone: transformers' models have one, too, which is no tuner
    tuner = model if isinstance(model, MethodModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, MethodModel):
        raise HeadwaterError(
            Problem(
                f"cannot merge within a {type(model).__name__}, which is not PEFT's wrapper of an adapted model",
                fix="give what get_peft_model or PeftModel.from_pretrained returned; an adapter of "
                "inject_adapter_in_model has to be loaded that way to be merged",
            )
        )
    return tuner, layers


def _gates_of(gates: Mapping[str, Any], names: list[str]) -> dict[str, Tensor]:
    """The gates as tensors, one for each of the layers and for nothing else."""
    missing = [name for name in names if name not in gates]
    problems = [Problem(f"no gate for layer {name}", fix="give one for each adapted layer") for name in missing]
    problems += [
        Problem(f"a gate for {name!r}, where no active adapter is", "gates", "name layers as headwater.observe does")
        for name in gates
        if name not in names
    ]
    found = {}
    for name in names:
        try:
            found[name] = torch.as_tensor(gates.get(name, ()))
        except (TypeError, ValueError, RuntimeError) as error:
            problems.append(Problem(f"the gate for layer {name} is no tensor or list of numbers: {error}", "gates"))
    if problems:
        raise HeadwaterError(*problems)
    return found


def _active(layer: MethodLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.branches]


def uniform_gate(branch: Branch) -> Tensor:
    """All of a branch's heads alike: `(N,)`."""
    held = branch.heads()
    N = 1 if held is None else held.B.shape[0]
    return torch.full((N,), 1 / N)


def _merge_and_unload(model: nn.Module, tuner: Any, how: list[tuple[MethodLayer, dict[str, Any]]]) -> nn.Module:
    for layer, fixed in how:  # a rehearsal: what would be refused is refused before the first layer is touched
        layer.merged_weight(_active(layer), **fixed)
    refuse_shared(model, [layer for layer, _ in how])
    for layer, fixed in how:
        layer.merge_with(**fixed)
    return tuner.unload()
