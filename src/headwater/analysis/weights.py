"""Reading an adapter's heads."""

from __future__ import annotations

from torch import nn

from ..methods.base import Heads
from ..tuner import MethodLayer


def heads(model: nn.Module, adapter_name: str = "default") -> dict[str, Heads]:
    """The heads of every adapted layer, by the layer's name in the base model.

    Empty for methods without heads. Tensors are the model's own, not copies; detach before changing them.
    """
    found: dict[str, Heads] = {}
    for module in model.modules():
        if isinstance(module, MethodLayer) and adapter_name in module.branches:
            held = module.branch(adapter_name).heads()
            if held is not None:
                found[module.name] = held
    return found
