"""One more task for an adapter that knows some already."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..errors import HeadwaterError, Problem
from ..methods.registry import method as registered
from .layer import MethodLayer
from .model import generator_for


def add_task(model: nn.Module, *, mixing: str = "mean", adapter_name: str = "default") -> int:
    """Gives an MTL-LoRA adapter one more task; what it does for the others stays as it is, bit for bit.

    The new task shares A and the up-projections; its matrix L is the identity. Saved from now on, the adapter knows the
    task. Call it before the optimiser is made, which would go on training the tensors from before.

    Source: Yang et al., arXiv:2410.09437, whose method leaves room for it; the start of a new task is headwater's own.

    Args:
        model: with the adapter, new, trained or loaded; to be trained further load it with `is_trainable=True`.
        mixing: how the new task mixes the up-projections: with the "mean" of the other tasks' logits w, or "fresh", as
            tasks begin with them.
        adapter_name: which of the model's adapters.

    Returns:
        The new task's id, which is the number of tasks before.

    Raises:
        HeadwaterError: there is no such adapter, it is merged, or its method has nothing that is a task's own.
    """
    if mixing not in ("mean", "fresh"):
        raise HeadwaterError(Problem(f"mixing is one of mean, fresh, not {mixing!r}", "mixing"))
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    layers = [m for m in model.modules() if isinstance(m, MethodLayer) and adapter_name in m.branches]
    if adapter_name not in configs or not layers:
        known = ", ".join(configs) or "none"
        what = f"the model has no headwater adapter named {adapter_name!r}"
        raise HeadwaterError(Problem(what, "adapter_name", f"its adapters: {known}"))
    branches: list[Any] = [layer.branch(adapter_name) for layer in layers]
    if not all(hasattr(branch, "add_task") for branch in branches):
        what = f"{registered(layers[0].method_name).title} cannot be given a task later"
        raise HeadwaterError(Problem(what, fix="method mtl_lora can; train this one on all tasks anew"))
    if any(adapter_name in layer.merged_adapters for layer in layers):
        what = f"adapter {adapter_name!r} is merged into the base model"
        raise HeadwaterError(Problem(what, "adapter_name", "call model.unmerge_adapter() first"))
    config = copy.copy(configs[adapter_name])  # another adapter may have been made from the same one
    for layer, branch in zip(layers, branches, strict=True):
        branch.add_task(mixing, generator_for(config, f"{layer.name} task {config.num_tasks}"))
    config.num_tasks += 1
    configs[adapter_name] = config
    return config.num_tasks - 1
