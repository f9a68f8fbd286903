"""The rank space of gated heads with both directions by hand, for several layers that read the same x at once.

    h = c [g_n * m_n * z  for n = 1..N]  and  -z_0         c = 1 / ((1 - p_x) (1 - p)),  y += s B_cat h

`g` is a softmax of logits or one number, `m` a 0/1 mask, `z_0 = A_0 x` of a frozen start, p_x the dropout on x. s c,
and a gate that is one number, go into operations that scale for nothing (`_times`): a scaled product of matrices costs
more than a plain one, and each small operation of another kind does, too. Backward, for dh = dy B^T:

    v_n = s c m_n * dh_n    dz = sum_n g_n v_n    dl = g * (d - sum_n g_n d_n), d_n = <v_n, z>    dz_0 = -s dh_0

`replayed` gives the same (tests compare them); with few tokens its many small operations cost as much as the matrix
products. Everything is laid out feature by feature, `(layers, features, tokens)`: tokens are the long, contiguous
dimension, and layers that read the same x share every operation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import Adapter, Tensors
from .dropout import keep_masks
from .lowrank import cast, stack, widened
from .replayed import Saved, Weights
from .stacks import matrices


class ByHand:
    """Adapters with `heads` that agree (`can_share`), on layers that read the same x."""

    def __init__(self, adapters: Sequence[Adapter]):
        heads = adapters[0].heads
        assert heads is not None
        self.adapters, self.heads = adapters, heads
        self.drops = adapters[0].seed is not None
        p_x, p = adapters[0].dropout if self.drops else 0.0, 0.0 if heads.seed is None else heads.dropout
        self.scale = adapters[0].scale
        self.factor = heads.gate / ((1 - p_x) * (1 - p))  # c
        G, r, N = len(adapters), heads.r, heads.num_heads
        # u's rows: every layer's z, then every layer's logits, then every layer's z_0
        self.rows = (G * r, G * N if heads.routed else 0, G * r if heads.start else 0)

    def forward(self, tensors: Sequence[Tensors], ys: Sequence[Tensor], x: Tensor, kept: Tensor | None = None) -> Saved:
        """Adds the updates to the layers' fresh outputs, each `(tokens, d_out)`, in place; returns what to save. `kept`
        are the heads' masks if they are drawn already (`draw_masks`)."""
        clean, downs, ups = weights = self._weights(tensors, x)
        bits: list[Tensor | None] = []
        if self.drops:
            read = [adapter.read_dropped(x, down) for adapter, down in zip(self.adapters, downs, strict=True)]
            bits = [b for _, b in read]
            u = torch.cat([*(part for part, _ in read), *([] if clean is None else [x @ clean.T])], 1)
        else:
            assert clean is not None
            u = x @ clean.T
        u = u.T.contiguous()
        z, logits, z_0 = self._parts(widened(u))
        gates = torch.softmax(logits, 1) if self.heads.routed else None
        kept = draw_masks(self.adapters, x.shape[0]) if kept is None else kept
        for i, adapter in enumerate(self.adapters):
            assert adapter.heads is not None
            if adapter.heads.show is not None and gates is not None:
                adapter.heads.show(gates[i].T)
        h = self._spread(z, z_0, gates, None if kept is None else kept.to(z.dtype))
        for up, y, of_layer in zip(ups, ys, cast(h, x.dtype), strict=True):
            y.addmm_(of_layer.T, up)
        # casts take long and are small; what is not cast is stacked again
        kept_weights = [w for t in tensors for w in t.flat()] if self.heads.dtype == x.dtype else weights.flat()
        return u, kept, *bits, *kept_weights

    def backward(
        self, dys: Sequence[Tensor], saved: Sequence[Tensor | None], x: Tensor, wanted: Sequence[Sequence[bool]]
    ) -> None:
        """From dy to du and the heads' gradients."""
        u, kept, *rest = saved
        assert u is not None
        self.x = x
        drawn = len(self.adapters) if self.drops else 0
        self.bits = rest[:drawn]
        given = rest[drawn:]
        if self.heads.dtype == x.dtype:
            self.weights = self._weights(self._tensors([w for w in given if w is not None]), x)
        else:
            self.weights = Weights.of(given, drawn)
        r, N = self.heads.r, self.heads.num_heads
        z, logits, z_0 = self._parts(widened(u))
        gates = torch.softmax(logits, 1) if self.heads.routed else None
        kept = None if kept is None else kept.to(z.dtype)  # a CPU takes several times as long to multiply by a bool
        h = self._spread(z, z_0, gates, kept)
        dh, self.of_up = torch.empty_like(h), []
        of_layers = zip(self.weights.ups, dys, cast(h, x.dtype), dh, wanted, strict=True)
        for up, dy, of_layer, d_layer, wants in of_layers:
            d_layer.copy_((dy @ up.T).T)
            self.of_up.append(cast(of_layer[: N * r] @ dy, self.heads.dtype) if wants[0] else None)
        v = dh[:, : N * r].view(len(dh), N, r, -1)
        self._times(v, kept, out=v)
        du = torch.empty_like(u, dtype=z.dtype)
        dz, d_logits, dz_0 = self._parts(du)
        if gates is None:
            torch.sum(v, 1, out=dz)
        else:
            torch.sum(gates.unsqueeze(2) * v, 1, out=dz)
            d = v.mul_(z.unsqueeze(1)).sum(2)
            d -= (gates * d).sum(1, keepdim=True)
            torch.mul(gates, d, out=d_logits)
        if self.heads.start:
            torch.mul(dh[:, N * r :], -self.scale, out=dz_0)
        self.du = cast(du, x.dtype)

    def add_to_dx(self, dx: Tensor | None) -> None:
        """Adds the updates' parts to dx `(tokens, d_in)` in place, and finds the down-projections' gradients."""
        x, r, du = self.x, self.heads.r, self.du
        self.of_down: list[list[Tensor | None]] = [[] for _ in self.adapters]
        sizes = [r, self.heads.num_heads] if self.heads.routed else [r]
        if self.drops:
            behind, du, sizes = du[: self.rows[0]].T, du[self.rows[0] :], sizes[1:]
            for i, adapter in enumerate(self.adapters):
                part = behind[:, i * r : (i + 1) * r]
                of_down = adapter.add_dropped(dx, x, part, self.weights.downs[i], self.bits[i])
                self.of_down[i].append(cast(of_down, self.heads.dtype))
        clean = self.weights.clean
        if clean is not None and dx is not None:
            dx.addmm_(du.T, clean)
        G = len(self.adapters)
        if sizes:  # not the starts', which come last and are frozen
            found = cast(du[: G * sum(sizes)] @ x, self.heads.dtype)
            parts = found.split_with_sizes([k for k in sizes for _ in range(G)])
            for i in range(G):
                self.of_down[i] += parts[i::G]

    def gradients(self) -> list[tuple[Tensor | None, ...]]:
        """For each adapter, in the order of `Tensors.flat`."""
        start = (None,) if self.heads.start else ()
        return [(up, *start, *down, *start) for up, down in zip(self.of_up, self.of_down, strict=True)]

    def _tensors(self, flat: Sequence[Tensor]) -> list[Tensors]:
        """Each layer's, from all of them one after the other."""
        up, size = 1 + self.heads.start, len(flat) // len(self.adapters)
        layers = [tuple(flat[i : i + size]) for i in range(0, len(flat), size)]
        return [Tensors(one[:up], one[up : up + 1], one[up + 1 :], ()) for one in layers]

    def _weights(self, tensors: Sequence[Tensors], x: Tensor) -> Weights:
        downs = [cast(t.dropped[0], x.dtype) for t in tensors] if self.drops else []
        clean, *ups = matrices(tensors, self.drops)
        return Weights(stack(clean, x) if clean else None, downs, [stack(up, x) for up in ups])

    def _parts(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, logits and z_0, `(layers, r or N, tokens)`; the last two may be empty."""
        G, tokens = len(self.adapters), u.shape[1]
        z, logits, z_0 = (part.view(G, part.shape[0] // G, tokens) for part in u.split_with_sizes(self.rows))
        return z, logits, z_0

    def _spread(self, z: Tensor, z_0: Tensor, gates: Tensor | None, kept: Tensor | None) -> Tensor:
        """s h, `(layers, N r, and r of the start, tokens)`."""
        G, r, tokens = z.shape
        N = self.heads.num_heads
        h = z.new_empty(G, N * r + z_0.shape[1], tokens)
        heads, z = h[:, : N * r].view(G, N, r, tokens), z.unsqueeze(1)
        if gates is None:
            self._times(z, kept, out=heads)
        elif kept is None:
            self._times(gates.unsqueeze(2), z, out=heads)
        else:
            self._times(torch.mul(gates.unsqueeze(2), z, out=heads), kept, out=heads)
        if self.heads.start:
            torch.mul(z_0, -self.scale, out=h[:, N * r :])
        return h

    def _times(self, a: Tensor, b: Tensor | None, *, out: Tensor) -> None:
        """out = s c a b."""
        if b is None:
            torch.mul(a.expand_as(out), self.scale * self.factor, out=out)
        else:
            torch.addcmul(_zero(a.dtype, a.device), a, b, value=self.scale * self.factor, out=out)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def can_share(adapters: Sequence[Adapter]) -> bool:
    """Whether one `ByHand` can run these adapters of layers that read the same x."""
    kinds = {
        (
            a.heads.r, a.heads.num_heads, a.heads.routed, a.heads.start, a.heads.gate, a.heads.dropout,
            a.heads.seed is None, a.seed is None, a.dropout, a.scale,
        )
        if a.heads is not None
        else id(a)
        for a in adapters
    }  # fmt: skip
    return len(kinds) == 1 and adapters[0].heads is not None


def draw_masks(adapters: Sequence[Adapter], tokens: int) -> Tensor | None:
    """The heads' masks of adapters that agree, bool `(layers, N, r, tokens)`; None without dropout."""
    heads = [adapter.heads for adapter in adapters if adapter.heads is not None]
    N, r, seeds = heads[0].num_heads, heads[0].r, [one.seed for one in heads if one.seed is not None]
    return keep_masks(seeds, N * r, tokens, heads[0].dropout).unflatten(1, (N, r)) if seeds else None
