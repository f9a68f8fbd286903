"""Runs a gated feed-forward block with adapters on its projections as one function, wherever that gives the same.

The block keeps its class; only its instance's `forward` is replaced, and calls the original whenever anything is out of
the ordinary: compilation, merged, disabled or several active adapters, hooks, a quantised projection, an activation
with parameters, and without gradients a prompt, which has no small operations to save.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ..ops import draw_seeds, implementation, is_plain, is_watched
from ..ops.gated_mlp import gated_mlp
from .decoding import Held, block_decoder, hooks_everywhere, may_decode
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
        adapted = [layer for layer in layers if isinstance(layer, MethodLayer)]
        if adapted and "forward" not in module.__dict__ and _is_gated_block(cast(Any, type(module))):
            module.forward = functools.partial(_forward, module, Held())
            module.__dict__["_replicate_for_data_parallel"] = functools.partial(_replica, module)
        forward: Any = module.__dict__.get("forward")
        for layer in adapted if _is_ours(forward) else []:
            layer.held[1:] = [forward.args[1]]


def unfuse_mlps(model: nn.Module) -> None:
    """Undoes `fuse_mlps`."""
    for module in model.modules():
        if _is_ours(module.__dict__.get("forward")):
            del module.forward, module._replicate_for_data_parallel


def _replica(mlp: Any) -> Any:
    """The block's copy for `nn.DataParallel`, which would take over our forward, and so run the original's layers."""
    replica = type(mlp)._replicate_for_data_parallel(mlp)
    del replica.forward, replica._replicate_for_data_parallel
    return replica


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _forward


@functools.lru_cache
def _is_gated_block(kind: Any) -> bool:
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    return _BLOCK.fullmatch("".join(source.split())) is not None


def _forward(mlp: Any, held: Held, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return type(mlp).forward(mlp, x)
    decoder = held.decoder
    if decoder is not None and decoder.fits(x):
        return decoder(x)
    last = held.drop()
    layers: list[Any] = [getattr(mlp, name) for name in PROJECTIONS]
    branches: list[Any] = [layer.only_branch() if type(layer) is MethodLayer else None for layer in layers]
    plain: list[Any] = [layer.base_layer if type(layer) is MethodLayer else layer for layer in layers]
    if _is_usual(mlp, layers, branches, plain, x):
        lead, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() or mlp.training:  # both forwards of reentrant checkpointing must round alike
            drawing = sum([branch is not None and branch.draws for branch in branches])
            seeds = iter(draw_seeds(x.device, drawing) if drawing else ())
            adapters = [
                None
                if branch is None
                else branch.adapter(
                    rows, layer.context.call(layer.name, tuple(lead)), next(seeds) if branch.draws else None
                )
                for layer, branch in zip(layers, branches, strict=True)
            ]
            act = F.silu if type(mlp.act_fn) in (nn.SiLU, SiLUActivation) else mlp.act_fn
            y = gated_mlp((adapters[0], adapters[1], adapters[2]), plain, act, rows)
            return y.reshape(*lead, y.shape[-1])
        holds = all(b is None or may_decode(b, layer.context, x) for layer, b in zip(layers, branches, strict=True))
        if holds and held.repeats(branches, last):
            held.decoder = decoder = block_decoder(mlp, layers, branches, x)
            if decoder is not None:
                return decoder(x)
    return type(mlp).forward(mlp, x)


def _is_usual(mlp: Any, layers: list[Any], branches: list[Any], plain: list[Any], x: Tensor) -> bool:
    if type(x) is not Tensor or implementation(x.device) == "reference":
        return False
    act = mlp.act_fn
    return (
        all(map(is_plain, plain))
        and not hooks_everywhere()
        and not (isinstance(act, nn.Module) and (act._parameters or act._modules or is_watched(act)))
        and not any(
            type(layer) is MethodLayer and (branch is None or is_watched(layer) or is_watched(branch))
            for layer, branch in zip(layers, branches, strict=True)
        )
    )
