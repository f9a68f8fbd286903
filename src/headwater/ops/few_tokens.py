"""Updates of a few tokens without gradients, as in decoding, where every call costs more than its work.

All hold copies of the weights, stacked and in the dtype of the layer, and add to the layers' outputs in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowrank import cast, stack, widened

Update = Callable[[Sequence[Tensor], Tensor, tuple[int, ...]], None]
"""`update(ys, x, lead)`: the outputs `(tokens, d_out)` of layers that read the same x `(tokens, d_in)`, and the leading
dimensions that x had."""


def factor_updates(factors: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> Update:
    """Each layer's update is one product: A `(R, d_in)` and B `(d_out, R)`."""
    down, sizes = _copied([A for A, _ in factors], like), [A.shape[0] for A, _ in factors]
    ups = [_copied([B.T], like) for _, B in factors]

    def update(ys: Sequence[Tensor], x: Tensor, lead: tuple[int, ...]) -> None:
        u = F.linear(x, down)
        for y, part, up in zip(ys, u.split_with_sizes(sizes, 1), ups, strict=True):
            y.addmm_(part, up)

    return update


def routed_updates(
    reads: Sequence[Sequence[Tensor]],
    ups: Sequence[Sequence[Tensor]],
    scales: Sequence[float],
    N: int,
    show: Callable[[Tensor, tuple[int, ...]], None],
    like: Tensor,
) -> Update:
    """Heads behind a softmax over a router's logits, on all layers as many and of the same rank.

    Args:
        reads: of each layer A `(r, d_in)`, the router `(N, d_in)` and the start's A, or no start on any.
        ups: the heads' `(N r, d_out)` and the start's, which is taken out.
        show: is given the gates, `(tokens, layers, N)`, and x's leading dimensions.
    """
    G, r = len(reads), reads[0][0].shape[0]
    # all layers' A, then all routers, then all starts
    order = list(zip(*[(*read[:2], *(-A0 for A0 in read[2:])) for read in reads], strict=True))
    down, sizes = _copied([w for group in order for w in group], like), [sum(w.shape[0] for w in g) for g in order]
    stacked = [_copied(up, like) for up in ups]

    def update(ys: Sequence[Tensor], x: Tensor, lead: tuple[int, ...]) -> None:
        z, logits, *start = widened(F.linear(x, down)).split_with_sizes(sizes, 1)
        gates = torch.softmax(logits.view(-1, G, N), 2)
        show(gates, lead)
        h = (gates.unsqueeze(3) * z.view(-1, G, 1, r)).flatten(2)
        hs = (torch.cat([h, start[0].view(-1, G, r)], 2) if start else h).unbind(1)
        for y, h, up, scale in zip(ys, hs, stacked, scales, strict=True):
            y.addmm_(cast(h, y.dtype), up, alpha=scale)

    return update


def mixed_update(
    reads: Sequence[Tensor],
    mix: Callable[[Sequence[Tensor], Tensor, tuple[int, ...]], Tensor],
    up: Tensor,
    scale: float,
    like: Tensor,
) -> Update:
    """Any method on one layer: `mix(ranks, x, lead)` gives what is written, `(tokens, m)`."""
    down, sizes, up = _copied(reads, like), [w.shape[0] for w in reads], _copied([up], like)

    def update(ys: Sequence[Tensor], x: Tensor, lead: tuple[int, ...]) -> None:
        ranks = widened(F.linear(x, down)).split_with_sizes(sizes, 1)
        ys[0].addmm_(cast(mix(ranks, x, lead), like.dtype), up, alpha=scale)

    return update


def _copied(weights: Sequence[Tensor], like: Tensor) -> Tensor:
    """Stacked, never the weight itself: what is held is all of one moment."""
    if len(weights) == 1:
        return weights[0].to(like.dtype, copy=True, memory_format=torch.contiguous_format)
    return stack(weights, like)
