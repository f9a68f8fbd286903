"""Reading an adapter's heads."""

from __future__ import annotations

from torch import nn

from ..errors import HeadwaterError, Problem
from ..methods.base import Heads
from ..tuner import MethodLayer


def heads(model: nn.Module, adapter_name: str | None = None) -> dict[str, Heads]:
    """The heads of every adapted layer, by the layer's name in the base model.

    Empty for methods without heads, PEFT's own among them. Tensors are the model's own, not copies; detach before
    changing them.

    Args:
        adapter_name: by default the active adapter.

    Raises:
        HeadwaterError: as `meant_adapter` does.
    """
    name = meant_adapter(model, adapter_name)
    found: dict[str, Heads] = {}
    for module in model.modules():
        if isinstance(module, MethodLayer) and name in module.branches:
            held = module.branch(name).heads()
            if held is not None:
                found[module.name] = held
    return found


def meant_adapter(model: nn.Module, adapter_name: str | None = None) -> str:
    """The adapter of that name, or the active one; empty where headwater has none on the model and none is named.

    Raises:
        HeadwaterError: no adapter has that name, or none is named and not exactly one is active.
    """
    layers = [module for module in model.modules() if isinstance(module, MethodLayer)]
    known = sorted({*getattr(model, "peft_config", ()), *(name for layer in layers for name in layer.branches)})
    there = f"there are {', '.join(known)}" if known else "there is none on this model"
    if adapter_name is not None:
        if adapter_name not in known:
            raise HeadwaterError(Problem(f"no adapter {adapter_name!r}", "adapter_name", there))
        return adapter_name
    active = {name for layer in layers for name in layer.active_adapters if name in layer.branches}
    if layers and len(active) != 1:
        what = f"{len(active)} adapters are active, and none is named"
        raise HeadwaterError(Problem(what, "adapter_name", f"name one: {there}"))
    return next(iter(active), "")
