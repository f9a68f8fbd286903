"""Gated heads for a few tokens without gradients, as in decoding, where every call costs more than its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import GatedHeads
from .lowrank import cast, stack, widened

Show = Callable[[Tensor], None]
Update = Callable[[Sequence[Tensor], Tensor, "Sequence[Show | None]"], None]


class Part(NamedTuple):
    """One layer's adapter.

    Args:
        heads: what it does in rank space; None where that is something else.
        read: the down-projections: A, the router, the start's.
        up: the heads' up-projections `(N r, d_out)`, and the start's.
        scale: s.
    """

    heads: Callable[[], GatedHeads | None]
    read: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
    scale: float


def few_tokens(heads: Sequence[GatedHeads], parts: Sequence[Part], like: Tensor) -> Update:
    """The updates of layers that read the same x, of heads that differ in nothing but their gates' values, in as few
    calls as there are: `update(ys, x, shows)` adds them to the ys in place and shows the gates.

    Copies of the weights are held, stacked and in the dtype of `like`; heads behind fixed gates become one.
    """
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

    def fixed(ys: Sequence[Tensor], x: Tensor, shows: Sequence[Show | None]) -> None:
        u = F.linear(x, stacked)
        write(ys, [u] if G == 1 else u.split_with_sizes(sizes, 1))

    def routed(ys: Sequence[Tensor], x: Tensor, shows: Sequence[Show | None]) -> None:
        z, logits, *rest = widened(F.linear(x, stacked)).split_with_sizes(sizes, 1)
        gates = torch.softmax(logits.view(-1, G, N), 2)
        for i, show in enumerate(shows):
            if show is not None:
                show(gates[:, i])
        h = (gates.unsqueeze(3) * z.view(-1, G, 1, r)).flatten(2)
        write(ys, (torch.cat([h, rest[0].view(-1, G, r)], 2) if rest else h).unbind(1))

    def write(ys: Sequence[Tensor], hs: Sequence[Tensor]) -> None:
        for y, h, B, scale in zip(ys, hs, Bs, scales, strict=True):
            y.addmm_(cast(h, y.dtype), B, alpha=scale)

    return routed if heads[0].routed else fixed


class HeldUpdate:
    """The `few_tokens` of layers that read the same x, made at the first token and held while tokens are decoded.

    Who holds it drops it with the first forward that is something else, such as the next prompt or a training step; it
    is made anew when a tensor is replaced or written to. So a write that PyTorch does not see, as through `.data`, is
    missed for one generation at most. Copies hold nothing.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._memory: list[Tensor] = []  # what the key names, kept so that nothing else comes to lie there
        self._update: Update | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldUpdate, ()

    def __bool__(self) -> bool:
        return self._update is not None

    def drop(self) -> None:
        self._key = self._update = None
        self._memory = []

    def get(self, parts: Sequence[Part], like: Tensor) -> Update | None:
        """The update for ys of the dtype of `like`; None where a rank space is something else, or not like the others',
        or where nobody counts the writes to a tensor (inference mode)."""
        tensors = [t for part in parts for t in (*part.read, *part.up)]
        if any(map(Tensor.is_inference, tensors)):
            return None
        key = (like.dtype, *[part.scale for part in parts], *[(t.data_ptr(), t._version, t.dtype) for t in tensors])
        if self._key != key:
            found = [part.heads() for part in parts]
            heads = [one for one in found if one is not None]
            kinds = {(one.r, one.num_heads, one.routed, one.start) for one in heads}
            if len(heads) < len(parts) or len(kinds) > 1:
                return None
            self._key, self._update = key, few_tokens(heads, parts, like)
            self._memory = [t.detach() for t in tensors]
        return self._update
