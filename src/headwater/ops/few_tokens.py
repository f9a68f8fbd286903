"""Gated heads for a few tokens without gradients, as in decoding, where every call costs more than its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import GatedHeads
from .lowrank import cast, stack, widened

Update = Callable[[Sequence[Tensor], Tensor], None]


class Part(NamedTuple):
    """One layer's adapter.

    Args:
        heads: what it does in rank space; None where that is something else.
        read: the down-projections: A, the router, the start's.
        up: the heads' up-projections `(N r, d_out)`, and the start's.
        scale: s.
    """

    heads: GatedHeads | None
    read: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
    scale: float


def few_tokens(parts: Sequence[Part], like: Tensor) -> Update | None:
    """The updates of layers that read the same x in as few calls as there are: `update(ys, x)` adds them to the ys in
    place. None where one is not gated heads, or they differ in more than their gates' values.

    Copies of the weights are held, stacked and in the dtype of `like`; heads behind fixed gates become one.
    """
    heads = [part.heads for part in parts if part.heads is not None]
    if len(heads) < len(parts) or len({(one.r, one.num_heads, one.routed, one.start) for one in heads}) > 1:
        return None
    if not heads:
        return lambda ys, x: None
    G, N, r = len(heads), heads[0].num_heads, heads[0].r
    down, Bs = [], []
    for one, part in zip(heads, parts, strict=True):
        of_heads, *start = part.up
        if not one.routed:
            of_heads = one.gate * of_heads.unflatten(0, (N, r)).sum(0)
        trained = len(part.read) - len(start)
        down.append([*part.read[:trained], *(-w for w in part.read[trained:])])  # what is written for the start is -z_0
        Bs.append(stack([of_heads, *start], like))
    # all layers' A, then all routers, then all starts; layer by layer where nothing happens between the products
    order = list(zip(*down, strict=True)) if heads[0].routed else down
    stacked = stack([w for group in order for w in group], like)
    scales, sizes = [part.scale for part in parts], [sum(w.shape[0] for w in group) for group in order]

    def fixed(ys: Sequence[Tensor], x: Tensor) -> None:
        u = F.linear(x, stacked)
        write(ys, [u] if G == 1 else u.split_with_sizes(sizes, 1))

    def routed(ys: Sequence[Tensor], x: Tensor) -> None:
        z, logits, *rest = widened(F.linear(x, stacked)).split_with_sizes(sizes, 1)
        gates = torch.softmax(logits.view(-1, G, N), 2)
        h = (gates.unsqueeze(3) * z.view(-1, G, 1, r)).flatten(2)
        write(ys, (torch.cat([h, rest[0].view(-1, G, r)], 2) if rest else h).unbind(1))

    def write(ys: Sequence[Tensor], hs: Sequence[Tensor]) -> None:
        for y, h, B, scale in zip(ys, hs, Bs, scales, strict=True):
            y.addmm_(cast(h, y.dtype), B, alpha=scale)

    return routed if heads[0].routed else fixed
