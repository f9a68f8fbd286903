"""Runs a gated feed-forward block with adapters on its projections as one function, wherever that gives the same.

The block keeps its class; only its instance's `forward` is replaced, and calls the original whenever anything is out of
the ordinary: no gradients, compilation, merged, disabled or several active adapters, hooks, a quantised projection.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import implementation, is_plain
from ..ops.gated_mlp import gated_mlp
from .layer import MethodLayer

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# As Llama, Mistral, Qwen2, Qwen3, Gemma and their kin write it; blocks that do something else have another text.
_BLOCK = re.compile(
    r"defforward\(self,(\w+)(:[\w.]+)?\)(->[\w.]+)?:(down_proj=|return)"
    r"self\.down_proj\(self\.act_fn\(self\.gate_proj\(\1\)\)\*self\.up_proj\(\1\)\)(returndown_proj)?"
)


def fuse_mlps(model: nn.Module) -> None:
    """Lets every gated block with at least one adapted projection run as one function in training."""
    for module in model.modules():
        layers = [getattr(module, name, None) for name in PROJECTIONS]
        adapted = any(isinstance(layer, MethodLayer) for layer in layers)
        if adapted and "forward" not in module.__dict__ and _is_gated_block(cast(Any, type(module))):
            module.forward = functools.partial(_forward, module)


def unfuse_mlps(model: nn.Module) -> None:
    """Undoes `fuse_mlps`."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, functools.partial) and forward.func is _forward:
            del module.forward


@functools.lru_cache
def _is_gated_block(kind: Any) -> bool:
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    return _BLOCK.fullmatch("".join(source.split())) is not None


def _forward(mlp: Any, x: Tensor) -> Tensor:
    layers: list[Any] = [getattr(mlp, name) for name in PROJECTIONS]
    learns = torch.is_grad_enabled() or mlp.training  # both forwards of reentrant checkpointing must round alike
    usual = learns and not torch.compiler.is_compiling() and type(x) is Tensor
    if not usual or implementation(x.device) == "reference" or _is_watched(mlp.act_fn):
        return type(mlp).forward(mlp, x)
    plain: list[Any] = [layer.base_layer if type(layer) is MethodLayer else layer for layer in layers]
    branches = [layer.only_branch() if type(layer) is MethodLayer else None for layer in layers]
    if not all(map(is_plain, plain)) or any(
        type(layer) is MethodLayer and (branch is None or _is_watched(layer) or _is_watched(branch))
        for layer, branch in zip(layers, branches, strict=True)
    ):
        return type(mlp).forward(mlp, x)
    lead, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
    adapters = [
        None if branch is None else branch.adapter(rows, layer.context.call(layer.name, tuple(lead)))
        for layer, branch in zip(layers, branches, strict=True)
    ]
    y = gated_mlp((adapters[0], adapters[1], adapters[2]), plain, mlp.act_fn, rows)
    return y.reshape(*lead, y.shape[-1])


def _is_watched(module: nn.Module) -> bool:
    """True if somebody hooks into the module's forward or backward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__
