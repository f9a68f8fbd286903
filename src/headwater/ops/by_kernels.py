"""`by_hand` on a GPU: the same equations, with the rank space in one Triton kernel a layer and direction.

A GPU waits for the program at each launch, so what counts besides the wide products is how few operations there are.
Everything lies token by token, the ranks of all layers that read the same x side by side, filled up with zeros to what
fast matrix products want (`lowrank.aligned`). The stacked weights are kept for backward: they are small beside x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Tensors
from .by_hand import ByHand
from .lowrank import cast
from .replayed import Saved, Weights
from .stacks import Stacked, Wanted, stack_now
from .triton_dropout import add_back, read, takes_along
from .triton_heads import Ranks, gather, spread


class ByKernels(ByHand):
    def forward(self, tensors: Sequence[Tensors], ys: Sequence[Tensor], x: Tensor, kept: Tensor | None = None) -> Saved:
        """As `ByHand.forward`; `kept` is not there, as no mask is ever in memory."""
        down, *ups = self._stacked(tensors, x)
        downs = [cast(t.dropped[0], x.dtype) for t in tensors] if self.drops else []
        parts, of_clean = [], None
        clean = self._beside(down, x)
        for adapter, weight in zip(self.adapters, downs, strict=False):  # none without dropout
            assert adapter.seed is not None
            part, found = read(x, weight, adapter.seed, adapter.dropout, clean=clean)
            parts.append(part)
            of_clean, clean = found if of_clean is None else of_clean, None
        if down is not None:
            parts.append(F.linear(x, down) if of_clean is None else of_clean)
        u = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        G, N, rows = len(ys), self.heads.num_heads, ups[0].shape[0]  # type: ignore[union-attr]
        filled_up = rows > self.written
        h = (u.new_zeros if filled_up else u.new_empty)(G, u.shape[0], rows)
        spread(self._ranks(u), h)
        for y, of_layer, up in zip(ys, h.unbind(), ups, strict=True):
            y.addmm_(of_layer, up)  # type: ignore[arg-type]
        for i, adapter in enumerate(self.adapters):
            assert adapter.heads is not None
            if adapter.heads.show is not None and adapter.heads.routed:
                first = self.rows[0] + i * N
                adapter.heads.show(torch.softmax(u[:, first : first + N].float(), 1))
        return u, down, *downs, *ups

    def backward(
        self, dys: Sequence[Tensor], saved: Sequence[Tensor | None], x: Tensor, wanted: Sequence[Sequence[bool]]
    ) -> None:
        drawn = len(dys) if self.drops else 0
        u, *weights = saved
        assert u is not None
        self.x = x
        self.down, self.downs, ups = Weights.of(weights, drawn)
        end, self.du = sum(self.rows), torch.empty_like(u)
        dh = u.new_empty(len(dys), u.shape[0], ups[0].shape[0])
        for dy, up, of_layer in zip(dys, ups, dh.unbind(), strict=True):
            torch.mm(dy, up.T, out=of_layer)
        h = torch.empty_like(dh) if any(wants[0] for wants in wanted) else None
        start = self.du if self.heads.start else None
        gather(self._ranks(u), dh, self.du, self.du, start, h, (end, u.shape[1] - end))
        of_heads, self.of_up = self.heads.num_heads * self.heads.r, []
        for i, (dy, wants) in enumerate(zip(dys, wanted, strict=True)):
            found = None if h is None or not wants[0] else (h[i].T @ dy)[:of_heads]
            self.of_up.append(None if found is None else cast(found, self.heads.dtype))

    def add_to_dx(self, dx: Tensor | None) -> None:
        x, r, du = self.x, self.heads.r, self.du
        self.of_down: list[list[Tensor | None]] = [[] for _ in self.adapters]
        sizes = [r, self.heads.num_heads] if self.heads.routed else [r]
        of_clean = None
        if self.drops:
            behind, du, sizes = du[:, : self.rows[0]], du[:, self.rows[0] :], sizes[1:]
            clean = self._beside(self.down, x)
            for i, (adapter, down) in enumerate(zip(self.adapters, self.downs, strict=True)):
                assert adapter.seed is not None
                part = behind[:, i * r : (i + 1) * r]
                of_down, found = add_back(dx, part, x, down, adapter.seed, adapter.dropout, clean=clean, d_clean=du)
                self.of_down[i].append(cast(of_down, self.heads.dtype))
                of_clean, clean = found if of_clean is None else of_clean, None
        if self.down is None:
            return
        if of_clean is None and dx is not None:
            dx.addmm_(du, self.down)
        G = len(self.adapters)
        if sizes:  # not the starts', which come last and are frozen
            of_clean = du.T @ x if of_clean is None else of_clean
            found = cast(of_clean[: G * sum(sizes)], self.heads.dtype)
            parts = found.split_with_sizes([k for k in sizes for _ in range(G)])
            for i in range(G):
                self.of_down[i] += parts[i::G]

    def _beside(self, down: Tensor | None, x: Tensor) -> Tensor | None:
        """The rows that read x as it is, if the first layer's kernels for dropout on x can take them along."""
        return down if self.drops and down is not None and takes_along(down, x) else None

    @property
    def written(self) -> int:
        """Columns of h that a layer writes: its heads' and its start's."""
        return self.heads.r * (self.heads.num_heads + self.heads.start)

    def _stacked(self, tensors: Sequence[Tensors], x: Tensor) -> Stacked:
        """The down-projections that read x as it is, in the order of u's columns, and each layer's up-projections."""
        stacks = self.adapters[0].stacks
        if stacks is not None:
            wanted = Wanted(tuple([adapter.at_rest for adapter in self.adapters]), self.drops, x.dtype)
            found = stacks.take(wanted, tensors, x.device)
            if found is not None:
                return found
        return stack_now(tensors, self.drops, x)

    def _ranks(self, u: Tensor) -> Ranks:
        """What the kernels read, from u as it is: every layer's z, then all layers' logits, then their z_0."""
        one, (z_rows, gate_rows, _) = self.heads, self.rows
        gate, z_0 = u if one.routed else None, u if one.start else None
        seeds = [a.heads.seed for a in self.adapters if a.heads is not None and a.heads.seed is not None]
        p, scale = one.dropout if seeds else 0.0, self.scale * self.factor
        at = (0, z_rows, z_rows + gate_rows)
        return Ranks(one.r, one.num_heads, u, gate, seeds, p, scale, z_0, -self.scale, at)
