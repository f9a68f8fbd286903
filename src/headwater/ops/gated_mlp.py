"""A whole gated feed-forward block with adapters on its projections as one autograd function.

    y = W_down (act(W_gate x) * W_up x)                   each W with or without an adapter

Saves x, the two wide pre-activations and what the adapters read: less than the block without adapters does through
plain autograd, because act(gate) and the product are made again in backward, and gradients with respect to x and to the
product are each summed in one memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .fused import Adapter, Backward, Tensors

Adapters = tuple[Adapter | None, Adapter | None, Adapter | None]


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        adapters: Adapters,
        theirs: Sequence[Tensors | None],
        act: Callable[[Tensor], Tensor],
        x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        weights, biases = tensors[:3], tensors[3:6]
        gate, u_gate = _run(adapters[0], theirs[0], x, weights[0], biases[0])
        up, u_up = _run(adapters[1], theirs[1], x, weights[1], biases[1])
        y, u_down = _run(adapters[2], theirs[2], act(gate) * up, weights[2], biases[2])
        ctx.sizes = [0 if t is None else len(t.flat()) for t in theirs]
        ctx.adapters, ctx.act = adapters, act
        ctx.save_for_backward(x, gate, up, u_gate, u_up, u_down, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, u_gate, u_up, u_down, W_gate, W_up, W_down = ctx.saved_tensors
        wanted = _split(ctx.needs_input_grad[10:], ctx.sizes)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.act(leaf)
        a = activated.detach() * up
        back_down = _rank_space(ctx.adapters[2], dy, u_down, a, wanted[2])
        da = dy @ W_down
        _to_input(back_down, da)
        d_up = da * activated.detach()
        (d_gate,) = torch.autograd.grad(activated, leaf, da.mul_(up))
        back_gate = _rank_space(ctx.adapters[0], d_gate, u_gate, x, wanted[0])
        back_up = _rank_space(ctx.adapters[1], d_up, u_up, x, wanted[1])
        dx = (d_gate @ W_gate).addmm_(d_up, W_up) if ctx.needs_input_grad[3] else None
        found: list[Tensor | None] = []
        for back, to in ((back_gate, dx), (back_up, dx)):
            _to_input(back, to)
        for back in (back_gate, back_up, back_down):
            found += [] if back is None else back.gradients()
        return None, None, None, dx, *[None] * 6, *found


def gated_mlp(adapters: Adapters, layers: Sequence[nn.Linear], act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The block's output, `(tokens, d_out)`.

    Args:
        adapters: those of the gate, up and down projection; None where a projection has none.
        layers: the three frozen linear layers, each `is_plain`.
        act: the activation, a differentiable function without parameters.
        x: `(tokens, d_in)`.
    """
    device = x.device.type
    x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    weights = [layer.weight.to(x.dtype) for layer in layers]
    biases = [None if layer.bias is None else layer.bias.to(x.dtype) for layer in layers]
    theirs = [None if adapter is None else adapter.tensors() for adapter in adapters]
    inputs = [tensor for tensors in theirs if tensors is not None for tensor in tensors.flat()]
    with torch.autocast(device, enabled=False):
        return _GatedMLP.apply(adapters, theirs, act, x, *weights, *biases, *inputs)


def _run(
    adapter: Adapter | None, tensors: Tensors | None, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The adapted projection of x and what the adapter read."""
    y = F.linear(x, weight, bias)
    if adapter is None or tensors is None:
        return y, None
    u = adapter.read(x, tensors)
    return adapter.add(y, u, x, tensors), u


def _rank_space(
    adapter: Adapter | None, dy: Tensor, u: Tensor | None, x: Tensor, wanted: Sequence[bool]
) -> Backward | None:
    return None if adapter is None or u is None else Backward(adapter, dy, u, x, wanted)


def _to_input(back: Backward | None, dx: Tensor | None) -> None:
    if back is not None:
        back.add_to_dx(dx)


def _split(values: Sequence[bool], sizes: Sequence[int]) -> list[Sequence[bool]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]
