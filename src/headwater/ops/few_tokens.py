"""Gated heads for a few tokens without gradients, as in decoding, where every call costs more than its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import GatedHeads
from .lowrank import cast, stack, widened

Show = Callable[[Tensor], None]
Update = Callable[[Tensor, Tensor, "Show | None"], Tensor]


def few_tokens(heads: GatedHeads, read: Sequence[Tensor], up: Sequence[Tensor], scale: float, like: Tensor) -> Update:
    """The update in as few calls as there are: `update(y, x, show)` adds it to y in place and shows the gates.

    Copies of the weights are held, stacked and in the dtype of `like`; heads behind fixed gates become one.

    Args:
        read: the down-projections: A, the router, the start's.
        up: the heads' up-projections `(N r, d_out)`, and the start's.
    """
    N, r = heads.num_heads, heads.r
    of_heads, *start = up
    if not heads.routed:
        of_heads = heads.gate * of_heads.unflatten(0, (N, r)).sum(0)
    trained = len(read) - len(start)
    down = stack([*read[:trained], *(-w for w in read[trained:])], like)  # what is written for the start is -z_0
    B, sizes = stack([of_heads, *start], like), [w.shape[0] for w in read]

    def fixed(y: Tensor, x: Tensor, show: Show | None) -> Tensor:
        return y.addmm_(F.linear(x, down), B, alpha=scale)

    def routed(y: Tensor, x: Tensor, show: Show | None) -> Tensor:
        z, logits, *rest = widened(F.linear(x, down)).split_with_sizes(sizes, 1)
        gates = torch.softmax(logits, 1)
        if show is not None:
            show(gates)
        h = (gates.unsqueeze(2) * z.unsqueeze(1)).flatten(1)
        return y.addmm_(cast(torch.cat([h, *rest], 1) if rest else h, y.dtype), B, alpha=scale)

    return routed if heads.routed else fixed
