"""A whole gated feed-forward block with adapters on its projections as one autograd function.

    y = W_down (act(W_gate x) * W_up x)                   each W with or without an adapter

Saves x, the two wide pre-activations and what the adapters read: less than the block without adapters does through
plain autograd, because act(gate) and the product are made again in backward, and gradients with respect to x and to the
product are each summed in one memory. Adapters of gate and up that are alike read x together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .adapter import Adapter, Tensors
from .by_hand import ByHand, can_share, draw_masks
from .fused import by_hand_on, rank_spaces, without_autocast
from .replayed import Replayed, Saved

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
        gate, up = (F.linear(x, weights[i], biases[i]) for i in (0, 1))
        present = [adapter for adapter in adapters if adapter is not None]
        kept, by_hand = None, by_hand_on(x.device)
        if by_hand is ByHand and can_share(present):
            kept = draw_masks(present, x.shape[0])  # once for all: a large part of the cost
        above = len(present) - (adapters[2] is not None)
        saved = _forward(by_hand, adapters[:2], theirs[:2], (gate, up), x, None if kept is None else kept[:above])
        product = act(gate) * up
        y = F.linear(product, weights[2], biases[2])
        of_down = _forward(by_hand, adapters[2:], theirs[2:], (y,), product, None if kept is None else kept[above:])
        saved += of_down
        ctx.sizes = [0 if t is None else len(t.flat()) for t in theirs]
        ctx.counts = [len(part) for part in saved]
        ctx.by_hand, ctx.adapters, ctx.act, ctx.below = by_hand, adapters, act, len(of_down)
        ctx.save_for_backward(x, gate, up, *weights, *(t for part in saved for t in part))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy.device):
            return _GatedMLP._backward(ctx, dy)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, W_gate, W_up, W_down, *rest = ctx.saved_tensors
        wanted, saved = _split(ctx.needs_input_grad[10:], ctx.sizes), _split(rest, ctx.counts)
        activated, pull = _activation(ctx.act, gate)
        product = activated * up
        at = len(saved) - ctx.below
        below = _backward(ctx.by_hand, ctx.adapters[2:], (dy,), saved[at:], product, wanted[2:])
        da = dy @ W_down
        for part in below:
            part.add_to_dx(da)
        d_up = torch.mul(da, activated, out=product)
        d_gate = pull(da.mul_(up))
        above = _backward(ctx.by_hand, ctx.adapters[:2], (d_gate, d_up), saved[:at], x, wanted[:2])
        dx = (d_gate @ W_gate).addmm_(d_up, W_up) if ctx.needs_input_grad[3] else None
        for part in above:
            part.add_to_dx(dx)
        found = [g for part in (*above, *below) for gradients in part.gradients() for g in gradients]
        return None, None, None, dx, *[None] * 6, *found


def _activation(act: Callable[[Tensor], Tensor], gate: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Its value, and what makes a gradient of the gate from one of the value."""
    if act is F.silu:  # what autograd calls, too; a graph of one operation takes the program several times as long
        return F.silu(gate), lambda da: torch.ops.aten.silu_backward.default(da, gate)
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        activated = act(leaf)
    return activated.detach(), lambda da: torch.autograd.grad(activated, leaf, da)[0]


def gated_mlp(adapters: Adapters, layers: Sequence[nn.Linear], act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The block's output, `(tokens, d_out)`.

    Args:
        adapters: those of the gate, up and down projection; None where a projection has none.
        layers: the three frozen linear layers, each `is_plain`.
        act: the activation, a differentiable function without parameters; `F.silu` is the fastest.
        x: `(tokens, d_in)`.
    """
    device = x.device.type
    x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    weights = [layer.weight.to(x.dtype) for layer in layers]
    biases = [None if layer.bias is None else layer.bias.to(x.dtype) for layer in layers]
    theirs = [None if adapter is None else adapter.tensors() for adapter in adapters]
    inputs = [tensor for tensors in theirs if tensors is not None for tensor in tensors.flat()]
    with without_autocast(x.device):
        return _GatedMLP.apply(adapters, theirs, act, x, *weights, *biases, *inputs)


def _forward(
    by_hand: type[ByHand],
    adapters: Sequence[Adapter | None],
    theirs: Sequence[Tensors | None],
    ys: Sequence[Tensor],
    x: Tensor,
    kept: Tensor | None,
) -> list[Saved]:
    """Adds the updates of layers that read the same x to their outputs."""
    present = [(t, y) for t, y in zip(theirs, ys, strict=True) if t is not None]
    saved = []
    for part in rank_spaces([adapter for adapter in adapters if adapter is not None], by_hand):
        own = [present.pop(0) for _ in part.adapters]
        saved.append(part.forward([t for t, _ in own], [y for _, y in own], x, kept))
    return saved


def _backward(
    by_hand: type[ByHand],
    adapters: Sequence[Adapter | None],
    dys: Sequence[Tensor],
    saved: list[Any],
    x: Tensor,
    wanted: Sequence[Any],
) -> list[ByHand | Replayed]:
    """The same parts, as far as du."""
    present = [(dy, w) for adapter, dy, w in zip(adapters, dys, wanted, strict=True) if adapter is not None]
    parts = rank_spaces([adapter for adapter in adapters if adapter is not None], by_hand)
    for part, kept in zip(parts, saved, strict=True):
        own = [present.pop(0) for _ in part.adapters]
        part.backward([dy for dy, _ in own], kept, x, [w for _, w in own])
    return parts


def _split(values: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]
