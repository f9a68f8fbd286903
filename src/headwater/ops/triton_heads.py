"""The kernels of `heads` in Triton: one launch forward, one backward, whatever the number of heads.

Both go over blocks of tokens with all of a token's gates and ranks at hand, so the softmax, the mask, the sum over
heads and the softmax's derivative stay in registers; z, the gate and the seed are read, and only h, dz and dgate are
written. All sums are in float32, in float64 for float64. The masks are those of `dropout`.

`forward` and `backward` are the contract of `heads`, whose results lie feature by feature. `spread` and `gather` are
the same kernels for `by_kernels`: they write into given columns, and know a frozen start beside the heads.
`tests/ops/triton_cases.py` checks them without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import threshold
from .triton_dropout import keeps, on_device_of, wide

ELEMENTS = 2048
"""Entries of a block: ranks or heads (whichever are more) times tokens."""


@triton.jit
def _gates(gate, token, inside, head, stride_t, stride_n, N, GATE: tl.constexpr, WIDE: tl.constexpr):
    """The gates of a block of tokens, `(heads, tokens)`; 0 beyond the last head."""
    known = (head < N)[:, None] & inside[None, :]
    if GATE == 2:
        return tl.where(known, 1.0, 0.0).to(WIDE)
    at = head.to(tl.int64)[:, None] * stride_n + token[None, :] * stride_t
    values = tl.load(gate + at, mask=known, other=0.0).to(WIDE)
    if GATE == 1:
        return values
    values = tl.where((head < N)[:, None], values, float("-inf"))
    values = tl.exp(values - tl.max(values, axis=0)[None, :])
    return values / tl.sum(values, axis=0)[None, :]


@triton.jit(do_not_specialize=["z_at", "gate_at", "z_0_at", "tokens"])
def _forward(
    z, gate, z_0, seed, h, z_at, gate_at, z_0_at, tokens, r, N,
    stride_zt, stride_zr, stride_gt, stride_gn, stride_hl, stride_ht, stride_hc, stride_s, limit,
    SCALE: tl.constexpr, START: tl.constexpr, DROPS: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr,
    HEADS: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    seed, h = seed + layer * stride_s, h + layer * stride_hl
    z, gate, z_0 = z + z_at + layer * r, gate + gate_at + layer * N, z_0 + z_0_at + layer * r
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    rank, head = tl.arange(0, RANKS), tl.arange(0, HEADS)
    known = (rank < r)[:, None] & inside[None, :]
    place = rank.to(tl.int64)[:, None] * stride_zr + token[None, :] * stride_zt
    ranks = tl.load(z + place, mask=known, other=0.0).to(WIDE) * tl.full([1, 1], SCALE, WIDE)
    g = _gates(gate, token, inside, head, stride_gt, stride_gn, N, GATE, WIDE)
    for n in range(N):
        g_n = tl.sum(tl.where((head == n)[:, None], g, 0.0), axis=0)
        values = ranks * g_n[None, :]
        column = (n * r + rank).to(tl.int64)[:, None]
        if DROPS:
            values = tl.where(keeps(seed, column * tokens, token.to(tl.int32)[None, :], limit, False), values, 0.0)
        tl.store(h + column * stride_hc + token[None, :] * stride_ht, values, mask=known)
    if START != 0:
        start = tl.load(z_0 + place, mask=known, other=0.0).to(WIDE) * tl.full([1, 1], START, WIDE)
        column = (N * r + rank).to(tl.int64)[:, None]
        tl.store(h + column * stride_hc + token[None, :] * stride_ht, start, mask=known)


@triton.jit(do_not_specialize=["z_at", "gate_at", "z_0_at", "end", "filled", "tokens"])
def _backward(
    dh, z, gate, seed, dz, dgate, dz_0, h, z_at, gate_at, z_0_at, end, filled, tokens, r, N,
    stride_hl, stride_ht, stride_hc, stride_zt, stride_zr, stride_gt, stride_gn,
    stride_dzt, stride_dzr, stride_dgt, stride_dgn, stride_s, limit,
    SCALE: tl.constexpr, START: tl.constexpr, DROPS: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr,
    AGAIN: tl.constexpr, HEADS: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    seed, dh, h = seed + layer * stride_s, dh + layer * stride_hl, h + layer * stride_hl
    beyond = dz + end
    z_at, gate_at, z_0_at = z_at + layer * r, gate_at + layer * N, z_0_at + layer * r
    z, gate = z + z_at, gate + gate_at
    dz, dgate, dz_0 = dz + z_at, dgate + gate_at, dz_0 + z_0_at
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    rank, head = tl.arange(0, RANKS), tl.arange(0, HEADS)
    known = (rank < r)[:, None] & inside[None, :]
    g = _gates(gate, token, inside, head, stride_gt, stride_gn, N, GATE, WIDE)
    d_ranks = tl.zeros([RANKS, TOKENS], WIDE)
    at = rank.to(tl.int64)[:, None] * stride_zr + token[None, :] * stride_zt
    ranks = tl.load(z + at, mask=known, other=0.0).to(WIDE)
    dg = tl.zeros([HEADS, TOKENS], WIDE)
    for n in range(N):
        column = (n * r + rank).to(tl.int64)[:, None]
        place = column * stride_hc + token[None, :] * stride_ht
        u = tl.load(dh + place, mask=known, other=0.0).to(WIDE) * tl.full([1, 1], SCALE, WIDE)
        here = (head == n)[:, None]
        g_n = tl.sum(tl.where(here, g, 0.0), axis=0)[None, :]
        values = ranks * tl.full([1, 1], SCALE, WIDE) * g_n
        if DROPS:
            kept = keeps(seed, column * tokens, token.to(tl.int32)[None, :], limit, False)
            u = tl.where(kept, u, 0.0)
            values = tl.where(kept, values, 0.0)
        d_ranks += u * g_n
        if GATE == 0:
            dg = tl.where(here, tl.sum(u * ranks, axis=0)[None, :], dg)
        if AGAIN:
            tl.store(h + place, values, mask=known)
    at = rank.to(tl.int64)[:, None] * stride_dzr + token[None, :] * stride_dzt
    tl.store(dz + at, d_ranks, mask=known)
    if START != 0:
        column = (N * r + rank).to(tl.int64)[:, None]
        start = tl.load(dh + column * stride_hc + token[None, :] * stride_ht, mask=known, other=0.0).to(WIDE)
        tl.store(dz_0 + at, start * tl.full([1, 1], START, WIDE), mask=known)
    if GATE == 0:
        d_logits = g * (dg - tl.sum(g * dg, axis=0)[None, :])
        written = (head < N)[:, None] & inside[None, :]
        tl.store(dgate + head.to(tl.int64)[:, None] * stride_dgn + token[None, :] * stride_dgt, d_logits, mask=written)
    empty = tl.arange(0, 8)
    place = empty.to(tl.int64)[:, None] * stride_dzr + token[None, :] * stride_dzt
    tl.store(beyond + place, tl.zeros([8, TOKENS], WIDE), mask=(empty < filled)[:, None] & inside[None, :])


def forward(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """h, `(tokens, N r)`; see `heads`."""
    tokens, r = z.shape
    h = z.new_empty(gate.shape[-1] * r, tokens).T
    spread(_one_layer(z, gate, seed, dropout), h.unsqueeze(0))
    return h


def backward(dh: Tensor, z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """dz `(tokens, r)` and dgate `(tokens, N)`, empty where gates are fixed; see `heads`."""
    dz = z.new_empty(z.shape[::-1]).T
    dgate = gate.new_empty(0) if gate.dim() == 1 else gate.new_empty(gate.shape[::-1]).T
    gather(_one_layer(z, gate, seed, dropout), dh.unsqueeze(0), dz, dgate)
    return dz, dgate


def _one_layer(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Ranks:
    return Ranks(z.shape[1], gate.shape[-1], z, gate, [] if seed is None else [seed], dropout, 1 / (1 - dropout))


class Ranks(NamedTuple):
    """What the kernels read. Layers are alike, and each begins where the one before ends.

    Args:
        z: `(tokens, r)` of each layer, any strides; of several layers, a column's next one is beside it.
        gate: logits `(tokens, N)` of each, likewise; gates `(N,)`, which get no gradient; None where all are 1.
        seeds, dropout: of each layer's mask; no seeds without one.
        scale: factor of everything that the heads write.
        z_0: a start's ranks, with z's strides; they are written behind the heads', times `start`.
        at: columns where z, gate and z_0 begin in the tensors given for them: wider ones spare the program the views.
    """

    r: int
    N: int
    z: Tensor
    gate: Tensor | None
    seeds: Sequence[Tensor]
    dropout: float
    scale: float = 1.0
    z_0: Tensor | None = None
    start: float = 0.0
    at: tuple[int, int, int] = (0, 0, 0)


def spread(ranks: Ranks, h: Tensor) -> None:
    """Writes h, `(layers, tokens, N r)` and the start's r columns, any strides."""
    z, gate, z_0, (seed, apart) = _pointers(ranks)
    strides = (*z.stride(), *_gate_strides(ranks.gate), *h.stride(), apart)
    _launch(_forward, ranks, (z, gate, z_0, seed, h, *ranks.at), h.shape[0], strides)


def gather(
    ranks: Ranks,
    dh: Tensor,
    dz: Tensor,
    dgate: Tensor,
    dz_0: Tensor | None = None,
    h: Tensor | None = None,
    fill: tuple[int, int] = (0, 0),
) -> None:
    """Writes what comes back from dh, `(layers, tokens, ...)`: dz `(tokens, r)`, dgate `(tokens, N)` if there are
    logits, dz_0 `(tokens, r)` if there is a start, in dz's strides, each where in its tensor what it belongs to is; and
    the heads' part of h once more if h is given, in dh's strides.

    Args:
        fill: a column of dz, and how many columns from there on, at most 8, are to be zeros.
    """
    z, gate, _, (seed, apart) = _pointers(ranks)
    at = (*ranks.at, *fill)
    pointers = (dh, z, gate, seed, dz, dgate, dz if dz_0 is None else dz_0, dh if h is None else h, *at)
    of_gate = dgate.stride() if dgate.dim() == 2 else (0, 0)
    strides = (*dh.stride(), *z.stride(), *_gate_strides(ranks.gate), *dz.stride(), *of_gate, apart)
    _launch(_backward, ranks, pointers, dh.shape[0], strides, AGAIN=h is not None)


def _pointers(ranks: Ranks) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, int]]:
    """What is missing is not read, but a pointer must be there."""
    z, gate, z_0, seeds = ranks.z, ranks.gate, ranks.z_0, ranks.seeds
    return z, z if gate is None else gate, z if z_0 is None else z_0, _first(seeds) if seeds else (z, 0)


def _first(seeds: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The first seed, and how far each is from the one before. Two of one draw are taken from where they lie."""
    first, last = seeds[0], seeds[-1]
    if first is last:
        return first, 0
    if len(seeds) > 2 or first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return torch.cat(list(seeds)), 1
    return first, int(last.storage_offset()) - int(first.storage_offset())


def _gate_strides(gate: Tensor | None) -> tuple[int, int]:
    if gate is None:
        return 0, 0
    return (0, gate.stride(0)) if gate.dim() == 1 else (gate.stride(0), gate.stride(1))


def _launch(
    kernel: Any, ranks: Ranks, first: tuple[Any, ...], layers: int, strides: tuple[int, ...], **constants: Any
) -> None:
    r, N, z, gate, seeds, dropout, scale, z_0, start, _ = ranks
    tokens = z.shape[0]
    if tokens == 0:
        return
    gates = 2 if gate is None else 2 - gate.dim()
    limit, block, how = _constants(r, N, bool(seeds), dropout, scale, 0.0 if z_0 is None else start, gates, wide(z))
    with on_device_of(z):
        kernel[(-(-tokens // block), layers)](*first, tokens, r, N, *strides, limit, **how, **constants)


@functools.cache
def _constants(
    r: int, N: int, drops: bool, dropout: float, scale: float, start: float, gate: int, wide: Any
) -> tuple[int, int, dict[str, Any]]:
    """The mask's limit, the tokens of a block, and what a kernel is compiled for; kept, as launches are many."""
    HEADS, RANKS = triton.next_power_of_2(N), triton.next_power_of_2(r)
    block = max(16, min(128, ELEMENTS // max(HEADS, RANKS)))
    how = {"SCALE": scale, "START": start, "DROPS": drops, "GATE": gate, "WIDE": wide, "enable_fp_fusion": True}
    return threshold(dropout), block, {**how, "HEADS": HEADS, "RANKS": RANKS, "TOKENS": block}
