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
from .lowrank import cast, stack
from .replayed import Saved
from .triton_dropout import MOST_RANKS, add_back, read
from .triton_heads import Ranks, gather, spread


class ByKernels(ByHand):
    def forward(self, tensors: Sequence[Tensors], ys: Sequence[Tensor], x: Tensor, kept: Tensor | None = None) -> Saved:
        """As `ByHand.forward`; `kept` is not there, as no mask is ever in memory."""
        down = self.clean_rows(tensors, x)
        parts, of_clean = [], None
        clean = self._beside(down)
        for adapter, t in zip(self.adapters, tensors, strict=True) if self.drops else ():
            assert adapter.seed is not None
            part, found = read(x, cast(t.dropped[0], x.dtype), adapter.seed, adapter.dropout, clean=clean)
            parts.append(part)
            of_clean, clean = found if of_clean is None else of_clean, None
        if down is not None:
            parts.append(x @ down.T if of_clean is None else of_clean)
        u = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        ups = [stack(t.up, y, fill=True) for t, y in zip(tensors, ys, strict=True)]
        for adapter, t, y, up, ranks in zip(self.adapters, tensors, ys, ups, self._ranks(u), strict=True):
            filled_up = up.shape[0] > sum(w.shape[0] for w in t.up)
            h = (y.new_zeros if filled_up else y.new_empty)(y.shape[0], up.shape[0])
            spread(ranks, h)
            y.addmm_(h, up)
            assert adapter.heads is not None
            if adapter.heads.show is not None and adapter.heads.routed:
                first = ranks.at[1]
                adapter.heads.show(torch.softmax(u[:, first : first + adapter.heads.num_heads].float(), 1))
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
        for i, ranks in enumerate(self._ranks(u)):
            up, dy = ups[i], dys[i]
            assert up is not None
            dh = dy @ up.T
            h = torch.empty_like(dh) if wanted[i][0] else None
            gather(ranks, dh, self.du, self.du, self.du if self.heads.start else None, h)
            of_heads = None if h is None else (h.T @ dy)[: N * r]
            self.of_up.append(None if of_heads is None else cast(of_heads, self.tensors[i].up[0].dtype))

    def add_to_dx(self, dx: Tensor | None) -> None:
        x, r, du = self.x, self.heads.r, self.du
        self.of_down: list[list[Tensor | None]] = [[] for _ in self.adapters]
        sizes = [r, self.heads.num_heads] if self.heads.routed else [r]
        of_clean = None
        if self.drops:
            behind, du, sizes = du[:, : self.rows[0]], du[:, self.rows[0] :], sizes[1:]
            clean = self._beside(self.down)
            for i, (adapter, t) in enumerate(zip(self.adapters, self.tensors, strict=True)):
                assert adapter.seed is not None
                down, part = cast(t.dropped[0], x.dtype), behind[:, i * r : (i + 1) * r]
                of_down, found = add_back(dx, part, x, down, adapter.seed, adapter.dropout, clean=clean, d_clean=du)
                self.of_down[i].append(cast(of_down, t.dropped[0].dtype))
                of_clean, clean = found if of_clean is None else of_clean, None
        if self.down is None:
            return
        if of_clean is None and dx is not None:
            dx.addmm_(du, self.down)
        G = len(self.adapters)
        if sizes:  # not the starts', which come last and are frozen
            of_clean = du.T @ x if of_clean is None else of_clean
            found = cast(of_clean[: G * sum(sizes)], self.tensors[0].dropped[0].dtype)
            parts = found.split([k for k in sizes for _ in range(G)])
            for i in range(G):
                self.of_down[i] += parts[i::G]

    def _beside(self, down: Tensor | None) -> Tensor | None:
        """The rows that read x as it is, if the first layer's kernels for dropout on x can take them along."""
        return down if self.drops and down is not None and len(down) <= MOST_RANKS else None

    def _ranks(self, u: Tensor) -> list[Ranks]:
        """What the kernels read of each layer's, from u as it is: z, then all layers' logits, then their z_0."""
        z_rows, gate_rows, _ = self.rows
        found = []
        for i, adapter in enumerate(self.adapters):
            one = adapter.heads
            assert one is not None
            at = (i * one.r, z_rows + i * one.num_heads, z_rows + gate_rows + i * one.r)
            gate, z_0 = u if one.routed else None, u if one.start else None
            p, scale = 0.0 if one.seed is None else one.dropout, self.scale * self.factor
            found.append(Ranks(one.r, one.num_heads, u, gate, one.seed, p, scale, z_0, -self.scale, at))
        return found
