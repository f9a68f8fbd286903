"""One adapted linear layer as one autograd function: what it saves for backward is x and the ranks read from it.

    u = A_cat x            h = mix(u)            y = W x + s B_cat h

`mix` is a method's rank-space part (`replayed`, `by_hand`). The update is added into the layer's fresh output, and its
part of dx into dx. Dropout on x is made block by block, so that no dropped copy of x exists in either direction.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .adapter import Adapter, Tensors
from .by_hand import ByHand, can_share
from .dispatch import implementation
from .replayed import Replayed, Unmixed


def rank_spaces(adapters: Sequence[Adapter], by_hand: type[ByHand]) -> list[ByHand | Replayed]:
    """What runs the rank spaces of layers that read the same x: one part for all, where they can share, else each its
    own; in order. `by_hand` is what runs plain gated heads on their device."""
    if len(adapters) > 1 and can_share(adapters):
        return [by_hand(adapters)]
    return [_replayed(adapter) if adapter.heads is None else by_hand([adapter]) for adapter in adapters]


def _replayed(adapter: Adapter) -> Replayed:
    return Unmixed(adapter) if adapter.unmixed else Replayed(adapter)


def by_hand_on(device: torch.device) -> type[ByHand]:
    """What runs plain gated heads there."""
    return _by_kernels() if implementation(device) == "triton" else ByHand


@functools.cache
def _by_kernels() -> type[ByHand]:
    from .by_kernels import ByKernels  # needs triton

    return ByKernels


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        adapter: Adapter,
        tensors: Tensors,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *_: Tensor,
    ) -> Tensor:
        y = F.linear(x, weight, bias) if y is None else y.clone()  # type: ignore[arg-type]
        ctx.adapter, ctx.by_hand = adapter, by_hand_on(x.device)
        (part,) = rank_spaces([adapter], ctx.by_hand)
        saved = part.forward([tensors], [y], x)
        ctx.save_for_backward(x, weight, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        of_y, of_x, *wanted = ctx.needs_input_grad[2:4] + ctx.needs_input_grad[6:]
        (back,) = rank_spaces([ctx.adapter], ctx.by_hand)
        with without_autocast(x.device):
            back.backward([dy], tuple(saved), x, [wanted])
            dx = None
            if of_x:
                dx = x.new_zeros(x.shape) if weight is None else dy @ weight
            back.add_to_dx(dx)
        return None, None, dy if of_y else None, dx, None, None, *back.gradients()[0]


def adapted_linear(adapter: Adapter, base: Tensor | nn.Linear, x: Tensor) -> Tensor:
    """The adapted layer's output, `(tokens, d_out)`.

    Args:
        base: the frozen layer's output `(tokens, d_out)`, or the frozen layer itself where `is_plain(base)`; then no
            second tensor of either width is made for the update.
        x: `(tokens, d_in)`.
    """
    device = x.device.type
    if isinstance(base, Tensor):
        arguments: tuple[Any, ...] = (base, x.to(base.dtype), None, None)
    else:
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        arguments = (None, x, base.weight.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))
    tensors = adapter.tensors()
    with without_autocast(x.device):
        return _AdaptedLinear.apply(adapter, tensors, *arguments, *tensors.flat())


def without_autocast(device: torch.device) -> torch.autocast:
    """Ranks keep their float32. Backward needs it as well as forward: it finds the autocast of whoever called it."""
    return torch.autocast(device.type, enabled=False)


def is_plain(layer: nn.Module) -> bool:
    """True for a frozen `nn.Linear` that nobody watches or replaces, whose forward may be computed elsewhere."""
    if type(layer) is not nn.Linear:
        return False
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not is_watched(layer)
    )


def is_watched(module: nn.Module) -> bool:
    """True if somebody hooks into the module's forward or backward, or has replaced it."""
    own = module.__dict__  # faster than to ask the module, and every layer is asked in every forward
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
