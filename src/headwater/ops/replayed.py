"""Any method's rank space: `mix` runs without gradients in forward and again, from the ranks u, in backward.

    u = A_cat x            h = mix(u)            y = W x + s B_cat h

    dh = s dy B_cat^T      dB_cat = s h^T dy      du, its parameters' gradients = mix's backward on (dh, losses' 1)
    dx = dy W, then du A_cat added in place       dA_cat = du^T x

The graph of `mix` in backward is a few numbers a token. So no method has to write a backward, and none saves more than
another. Where `mix` changes nothing there is nothing to replay (`Unmixed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter, Tensors
from .lowrank import aligned, cast, product, stack

Saved = tuple[Tensor | None, ...]


class Weights(NamedTuple):
    """Stacked as the products take them, in x's dtype: the down-projections that read x as it is, those behind dropout
    and the up-projections, one of the latter two for each layer."""

    clean: Tensor | None
    downs: Sequence[Tensor]
    ups: Sequence[Tensor]

    def flat(self) -> Saved:
        return self.clean, *self.downs, *self.ups

    @classmethod
    def of(cls, saved: Sequence[Tensor | None], downs: int) -> Weights:
        """From what `flat` gave."""
        clean, *others = saved
        present = [w for w in others if w is not None]
        return cls(clean, present[:downs], present[downs:])


class Replayed:
    """One adapter on one layer."""

    def __init__(self, adapter: Adapter):
        self.adapter, self.adapters = adapter, [adapter]
        self.alpha = adapter.scale  # what h is still to be multiplied by

    def forward(self, tensors: Sequence[Tensors], ys: Sequence[Tensor], x: Tensor, kept: Tensor | None = None) -> Saved:
        """Adds the update to y `(tokens, d_out)` in place; returns what backward needs."""
        (of_adapter,), (y,) = tensors, ys
        weights = self._weights(of_adapter, x)
        parts, bits = [], None
        if weights.downs:
            u, bits = self.adapter.read_dropped(x, weights.downs[0])
            parts.append(u)
        if weights.clean is not None:
            parts.append((x @ aligned(weights.clean, 0).T)[:, : weights.clean.shape[0]])
        u = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        h = self._mixed(u, of_adapter, x)
        y.addmm_(aligned(cast(h, y.dtype)), aligned(weights.ups[0], 0), alpha=self.alpha)
        if of_adapter.up[0].dtype == x.dtype:
            return u, bits, None, None, None, *of_adapter.others
        # casts take long and are small
        return u, bits, weights.clean, weights.downs[0] if weights.downs else None, weights.ups[0], *of_adapter.others

    def _weights(self, tensors: Tensors, x: Tensor) -> Weights:
        dropped, clean = tensors.dropped, tensors.clean
        if self.adapter.seed is None:
            dropped, clean = (), (*dropped, *clean)
        downs = [stack(dropped, x)] if dropped else []
        return Weights(stack(clean, x) if clean else None, downs, [stack(tensors.up, x)])

    def backward(
        self, dys: Sequence[Tensor], saved: Sequence[Tensor | None], x: Tensor, wanted: Sequence[Sequence[bool]]
    ) -> None:
        """From dy to du, and the gradients of the up-projections and of `mix`'s parameters."""
        (dy,), (u, self.bits, clean, down, stacked_up, *others), (wants,) = dys, saved, wanted
        assert u is not None
        self.x, self.tensors = x, self.adapter.tensors([w for w in others if w is not None])
        tensors = self.tensors
        if stacked_up is None:
            self.weights = self._weights(tensors, x)
        else:
            self.weights = Weights(clean, [] if down is None else [down], [stacked_up])
        ups, reads = len(tensors.up), len(tensors.dropped) + len(tensors.clean)
        wanted_up, self.wanted_reads, wanted_others = wants[:ups], wants[ups : ups + reads], wants[ups + reads :]
        up = self.weights.ups[0]
        dh = product(dy, aligned(up, 0).T, self.alpha)[:, : up.shape[0]]
        h = self._pull(u, dh, wanted_others)
        self.of_up = outer(h, dy, tensors.up, wanted_up, self.alpha)

    def _mixed(self, u: Tensor, tensors: Tensors, x: Tensor) -> Tensor:
        return self.adapter.mix(self.adapter.ranks(u, tensors), x, None)[0]

    def _pull(self, u: Tensor, dh: Tensor, wanted: Sequence[bool]) -> Tensor:
        """From dh to du and the gradients of `mix`'s parameters; returns h."""
        # Leaves of their own: a parameter's hooks are for its whole gradient, and it may be frozen by now.
        others = [p.detach().requires_grad_(want) for p, want in zip(self.tensors.others, wanted, strict=True)]
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            h, losses = self.adapter.mix(self.adapter.ranks(leaf, self.tensors), self.x, others)
        trained = [p for p, want in zip(others, wanted, strict=True) if want]
        ends = [(h, cast(dh, h.dtype)), *((loss, torch.ones_like(loss)) for loss in losses)]
        outputs, grads = zip(*[end for end in ends if end[0].requires_grad], strict=True)
        du, *of_trained = torch.autograd.grad(outputs, [leaf, *trained], grads, allow_unused=True)
        self.du = torch.zeros_like(u) if du is None else du
        given = iter(of_trained)
        self.of_others = [next(given) if want else None for want in wanted]
        return h.detach()

    def add_to_dx(self, dx: Tensor | None) -> None:
        """Adds the update's part to dx `(tokens, d_in)` in place, and finds the down-projections' gradients."""
        x, du, (clean, downs, _) = self.x, self.du, self.weights
        behind, straight = self.tensors.dropped, self.tensors.clean
        self.of_reads: list[Tensor | None] = []
        if downs:
            count = 0 if clean is None else len(clean)
            of_behind, du = du.split([du.shape[1] - count, count], 1)
            found = self.adapter.add_dropped(dx, x, of_behind, downs[0], self.bits)
            rows_of = found.split([w.shape[0] for w in behind])
            self.of_reads += [cast(g, w.dtype) for g, w in zip(rows_of, behind, strict=True)]
        else:
            straight = (*behind, *straight)
        if clean is not None:
            if dx is not None:
                dx.addmm_(aligned(du), aligned(clean, 0))
            self.of_reads += outer(du, x, straight, self.wanted_reads[len(self.of_reads) :], 1.0)

    def gradients(self) -> list[tuple[Tensor | None, ...]]:
        """In the order of `Tensors.flat`."""
        return [(*self.of_up, *self.of_reads, *self.of_others)]


class Unmixed(Replayed):
    """One adapter on one layer whose h is u, all ranks in their order; s and what scales for dropout go in at once."""

    def __init__(self, adapter: Adapter):
        super().__init__(adapter)
        self.alpha = 1.0

    def _mixed(self, u: Tensor, tensors: Tensors, x: Tensor) -> Tensor:
        if self.adapter.seed is None:
            return u * self.adapter.scale
        behind = u.shape[1] - sum(w.shape[0] for w in tensors.clean)
        scaled = u[:, :behind] * (self.adapter.scale / (1 - self.adapter.dropout))
        return torch.cat([scaled, u[:, behind:] * self.adapter.scale], 1) if tensors.clean else scaled

    def _pull(self, u: Tensor, dh: Tensor, wanted: Sequence[bool]) -> Tensor:
        self.du, self.of_others = self._mixed(dh, self.tensors, self.x), [None] * len(wanted)
        return self._mixed(u, self.tensors, self.x)


def outer(
    ranks: Tensor, wide: Tensor, like: Sequence[Tensor], wanted: Sequence[bool], scale: float
) -> list[Tensor | None]:
    """`scale ranks^T wide`, the rows of each of the matrices in `like` that is wanted; what is not is not computed."""
    columns = ranks.split([w.shape[0] for w in like], dim=1)
    trained = [part for part, want in zip(columns, wanted, strict=True) if want]
    if not trained:
        return [None] * len(like)
    joined = trained[0] if len(trained) == 1 else torch.cat(trained, 1)
    found = product(aligned(cast(joined, wide.dtype)).T, wide, scale)[: joined.shape[1]]
    rows = iter(found.split([part.shape[1] for part in trained]))
    return [cast(next(rows), w.dtype) if want else None for w, want in zip(like, wanted, strict=True)]
