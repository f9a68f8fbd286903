"""`by_hand` on a GPU: the same equations, with the rank space in one Triton kernel a layer and direction.

A GPU waits for the program at each launch, so what counts besides the wide products is how few operations there are.
Everything lies token by token, the ranks of all layers that read the same x side by side, filled up with zeros to what
fast matrix products want (`lowrank.aligned`). The stacked weights are kept for backward: they are small beside x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import Tensors
from .by_hand import ByHand
from .lowrank import aligned, cast, product, stack
from .replayed import Saved
from .triton_heads import Ranks, gather, spread


class ByKernels(ByHand):
    def forward(self, tensors: Sequence[Tensors], ys: Sequence[Tensor], x: Tensor, kept: Tensor | None = None) -> Saved:
        """As `ByHand.forward`; `kept` is not there, as no mask is ever in memory."""
        down = self.clean_rows(tensors, x)
        down = None if down is None else aligned(down, 0)
        parts = [] if down is None else [x @ down.T]
        if self.drops:
            read = [a.read_dropped(x, cast(t.dropped[0], x.dtype)) for a, t in zip(self.adapters, tensors, strict=True)]
            parts = [*(part for part, _ in read), *parts]
        u = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        ups = [aligned(stack(t.up, y), 0) for t, y in zip(tensors, ys, strict=True)]
        for adapter, t, y, up, ranks in zip(self.adapters, tensors, ys, ups, self._ranks(u), strict=True):
            filled_up = up.shape[0] > sum(w.shape[0] for w in t.up)
            h = (y.new_zeros if filled_up else y.new_empty)(y.shape[0], up.shape[0])
            spread(ranks, h)
            y.addmm_(h, up, alpha=adapter.scale * self.factor)
            assert adapter.heads is not None
            if adapter.heads.show is not None and ranks.gate is not None:
                adapter.heads.show(torch.softmax(ranks.gate.float(), 1))
        return u, down, *ups

    def backward(
        self, dys: Sequence[Tensor], saved: Sequence[Tensor | None], x: Tensor, wanted: Sequence[Sequence[bool]]
    ) -> None:
        u, self.down, *ups = saved
        assert u is not None
        self.x = x
        self.tensors = [adapter.tensors() for adapter in self.adapters]
        filled_up = u.shape[1] > sum(self.rows)
        self.du, self.of_up = (u.new_zeros if filled_up else u.new_empty)(u.shape), []
        N, r = self.heads.num_heads, self.heads.r
        of_ranks = zip(self._ranks(u), self._columns(self.du), strict=True)
        for i, (ranks, (dz, d_logits, dz_0)) in enumerate(of_ranks):
            up, dy, scale = ups[i], dys[i], self.adapters[i].scale * self.factor
            assert up is not None
            dh = product(dy, up.T, scale)
            h = torch.empty_like(dh) if wanted[i][0] else None
            gather(ranks, dh, dz, d_logits, dz_0 if self.heads.start else None, h)
            of_heads = None if h is None else product(h.T, dy, scale)[: N * r]
            self.of_up.append(None if of_heads is None else cast(of_heads, self.tensors[i].up[0].dtype))

    def add_to_dx(self, dx: Tensor | None) -> None:
        x, r, du = self.x, self.heads.r, self.du
        self.of_down: list[list[Tensor | None]] = [[] for _ in self.adapters]
        sizes = [r, self.heads.num_heads] if self.heads.routed else [r]
        if self.drops:
            for i, (adapter, t) in enumerate(zip(self.adapters, self.tensors, strict=True)):
                down = cast(t.dropped[0], x.dtype)
                of_down = adapter.add_dropped(dx, x, du[:, i * r : (i + 1) * r], down, None)
                self.of_down[i].append(cast(of_down, t.dropped[0].dtype))
            du, sizes = du[:, self.rows[0] :], sizes[1:]
        if self.down is None:
            return
        if dx is not None:
            dx.addmm_(du, self.down)
        G = len(self.adapters)
        if sizes:  # not the starts', which come last and are frozen
            found = cast((du.T @ x)[: G * sum(sizes)], self.tensors[0].dropped[0].dtype)
            parts = found.split([k for k in sizes for _ in range(G)])
            for i in range(G):
                self.of_down[i] += parts[i::G]

    def _columns(self, u: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Each layer's columns of z, logits and z_0; the last two may be none."""
        G = len(self.adapters)
        sizes = [rows // G for rows in self.rows for _ in range(G)]
        parts = u.split([*sizes, u.shape[1] - sum(sizes)], 1)
        return list(zip(parts[:G], parts[G : 2 * G], parts[2 * G : 3 * G], strict=True))

    def _ranks(self, u: Tensor) -> list[Ranks]:
        found = []
        for adapter, (z, logits, z_0) in zip(self.adapters, self._columns(u), strict=True):
            one = adapter.heads
            assert one is not None
            gate, start = logits if one.routed else None, z_0 if one.start else None
            p = 0.0 if one.seed is None else one.dropout
            found.append(Ranks(one.r, one.num_heads, z, gate, one.seed, p, z_0=start, start=-1 / self.factor))
        return found
