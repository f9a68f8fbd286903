"""Runs a gated feed-forward block with adapters on its projections as one function, wherever that gives the same.

The block keeps its class; only its instance's `forward` is replaced, and calls the original whenever anything is out of
the ordinary: compilation, merged, disabled or several active adapters, hooks, a quantised projection, and without
gradients a prompt, which has no small operations to save.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ..methods.base import Branch
from ..ops import HeldUpdate, implementation, is_plain
from ..ops.gated_mlp import gated_mlp
from ..ops.lowrank import FEW
from .layer import MethodLayer

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# As Llama, Mistral, Qwen2, Qwen3, Gemma and their kin write it; blocks that do something else have another text.
_BLOCK = re.compile(
    r"defforward\(self,(\w+)(:[\w.]+)?\)(->[\w.]+)?:(down_proj=|return)"
    r"self\.down_proj\(self\.act_fn\(self\.gate_proj\(\1\)\)\*self\.up_proj\(\1\)\)(returndown_proj)?"
)


def fuse_mlps(model: nn.Module) -> None:
    """Lets every gated block with at least one adapted projection run as one function in training and decoding."""
    for module in model.modules():
        layers = [getattr(module, name, None) for name in PROJECTIONS]
        adapted = any(isinstance(layer, MethodLayer) for layer in layers)
        if adapted and "forward" not in module.__dict__ and _is_gated_block(cast(Any, type(module))):
            module.forward = functools.partial(_forward, module, (HeldUpdate(), HeldUpdate()))


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


def _forward(mlp: Any, held: tuple[HeldUpdate, HeldUpdate], x: Tensor) -> Tensor:
    layers: list[Any] = [getattr(mlp, name) for name in PROJECTIONS]
    branches: list[Any] = [layer.only_branch() if type(layer) is MethodLayer else None for layer in layers]
    plain: list[Any] = [layer.base_layer if type(layer) is MethodLayer else layer for layer in layers]
    if _is_usual(mlp, layers, branches, plain, x):
        lead, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
        calls = [
            None if branch is None else layer.context.call(layer.name, tuple(lead))
            for layer, branch in zip(layers, branches, strict=True)
        ]
        y = None
        if torch.is_grad_enabled() or mlp.training:  # both forwards of reentrant checkpointing must round alike
            _drop(held)
            adapters = [None if b is None else b.adapter(rows, call) for b, call in zip(branches, calls, strict=True)]
            y = gated_mlp((adapters[0], adapters[1], adapters[2]), plain, mlp.act_fn, rows)
        elif rows.shape[0] <= FEW and not torch.is_autocast_enabled(x.device.type):
            y = _decoded(plain, branches, calls, held, mlp.act_fn, rows)
        if y is not None:
            return y.reshape(*lead, y.shape[-1])
    _drop(held)
    return type(mlp).forward(mlp, x)


def _is_usual(mlp: Any, layers: list[Any], branches: list[Any], plain: list[Any], x: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(x) is not Tensor or implementation(x.device) == "reference":
        return False
    return (
        all(map(is_plain, plain))
        and not (torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)
        and not _is_watched(mlp.act_fn)
        and not any(
            type(layer) is MethodLayer and (branch is None or _is_watched(layer) or _is_watched(branch))
            for layer, branch in zip(layers, branches, strict=True)
        )
    )


def _decoded(
    plain: list[Any], branches: list[Any], calls: list[Any], held: tuple[HeldUpdate, HeldUpdate], act: Any, x: Tensor
) -> Tensor | None:
    """The block for a few tokens without gradients; None where an update is not plain gated heads."""
    present = [i for i, branch in enumerate(branches) if branch is not None]
    if any(branches[i].training or type(branches[i]).gated_heads is Branch.gated_heads for i in present):
        return None
    if any(calls[i].begins for i in present):
        _drop(held)
    groups = [[i for i in present if i < 2], [i for i in present if i == 2]]
    updates = []
    for group, keeper in zip(groups, held, strict=True):
        update = keeper.get([branches[i].part(calls[i]) for i in group], x) if group else None
        if group and update is None:
            return None
        updates.append(update)
    shows = [call.saw_gate if call is not None and call.observed else None for call in calls]
    gate, up = (F.linear(x, layer.weight, layer.bias) for layer in plain[:2])
    if updates[0] is not None:
        updates[0]([(gate, up)[i] for i in groups[0]], x, [shows[i] for i in groups[0]])
    product = act(gate) * up
    y = F.linear(product, plain[2].weight, plain[2].bias)
    if updates[1] is not None:
        updates[1]([y], product, shows[2:])
    return y


def _drop(held: tuple[HeldUpdate, HeldUpdate]) -> None:
    for update in held:
        update.drop()


def _is_watched(module: nn.Module) -> bool:
    """True if somebody hooks into the module's forward or backward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__
