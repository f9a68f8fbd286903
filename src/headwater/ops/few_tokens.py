"""Gated heads for a few tokens without gradients, as in decoding, where every call costs more than its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


class HeldUpdate:
    """The `few_tokens` of one layer, made at the first token and held while tokens are decoded.

    It is dropped with the first forward that is something else, such as the next prompt or a training step, and made
    anew when a tensor is replaced or written to; so a write that PyTorch does not see, as through `.data`, is missed
    for one generation at most. Copies hold nothing.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._update: Update | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldUpdate, ()

    def __bool__(self) -> bool:
        return self._update is not None

    def drop(self) -> None:
        self._key = self._update = None

    def get(
        self,
        heads: Callable[[], GatedHeads | None],
        read: Sequence[Tensor],
        up: Sequence[Tensor],
        scale: float,
        like: Tensor,
    ) -> Update | None:
        """The update; None where `heads` gives None, or where nobody counts the writes to a tensor (inference mode).
        The other arguments are those of `few_tokens`."""
        tensors = (*read, *up)
        if any(t.is_inference() for t in tensors):
            return None
        key = (like.dtype, scale, *[(t.data_ptr(), t._version, t.dtype) for t in tensors])
        if self._key != key:
            found = heads()
            if found is None:
                return None
            self._key, self._update = key, few_tokens(found, read, up, scale, like)
        return self._update
