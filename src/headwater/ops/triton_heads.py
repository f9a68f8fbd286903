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
from typing import Any, NamedTuple

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
    values = tl.load(gate + head[:, None] * stride_n + token[None, :] * stride_t, mask=known, other=0.0).to(WIDE)
    if GATE == 1:
        return values
    values = tl.where((head < N)[:, None], values, float("-inf"))
    values = tl.exp(values - tl.max(values, axis=0)[None, :])
    return values / tl.sum(values, axis=0)[None, :]


@triton.jit(do_not_specialize=["z_at", "gate_at", "z_0_at", "tokens"])
def _forward(
    z, gate, z_0, seed, h, z_at, gate_at, z_0_at, tokens, r, N,
    stride_zt, stride_zr, stride_gt, stride_gn, stride_ht, stride_hc, limit,
    SCALE: tl.constexpr, START: tl.constexpr, DROPS: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr,
    HEADS: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    z, gate, z_0 = z + z_at, gate + gate_at, z_0 + z_0_at
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    rank, head = tl.arange(0, RANKS), tl.arange(0, HEADS)
    known = (rank < r)[:, None] & inside[None, :]
    place = rank[:, None] * stride_zr + token[None, :] * stride_zt
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


@triton.jit(do_not_specialize=["z_at", "gate_at", "z_0_at", "tokens"])
def _backward(
    dh, z, gate, seed, dz, dgate, dz_0, h, z_at, gate_at, z_0_at, tokens, r, N,
    stride_ht, stride_hc, stride_zt, stride_zr, stride_gt, stride_gn,
    stride_dzt, stride_dzr, stride_dgt, stride_dgn, limit,
    SCALE: tl.constexpr, START: tl.constexpr, DROPS: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr,
    AGAIN: tl.constexpr, HEADS: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    z, gate = z + z_at, gate + gate_at
    dz, dgate, dz_0 = dz + z_at, dgate + gate_at, dz_0 + z_0_at
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    rank, head = tl.arange(0, RANKS), tl.arange(0, HEADS)
    known = (rank < r)[:, None] & inside[None, :]
    g = _gates(gate, token, inside, head, stride_gt, stride_gn, N, GATE, WIDE)
    d_ranks = tl.zeros([RANKS, TOKENS], WIDE)
    ranks = tl.load(z + rank[:, None] * stride_zr + token[None, :] * stride_zt, mask=known, other=0.0).to(WIDE)
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


def forward(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """h, `(tokens, N r)`; see `heads`."""
    tokens, r = z.shape
    h = z.new_empty(gate.shape[-1] * r, tokens).T
    spread(Ranks(r, gate.shape[-1], z, gate, seed, dropout, scale=1 / (1 - dropout)), h)
    return h


def backward(dh: Tensor, z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """dz `(tokens, r)` and dgate `(tokens, N)`, empty where gates are fixed; see `heads`."""
    dz = z.new_empty(z.shape[::-1]).T
    dgate = gate.new_empty(0) if gate.dim() == 1 else gate.new_empty(gate.shape[::-1]).T
    ranks = Ranks(z.shape[1], gate.shape[-1], z, gate, seed, dropout, scale=1 / (1 - dropout))
    gather(ranks, dh, dz, dgate)
    return dz, dgate


class Ranks(NamedTuple):
    """What the kernels read.

    Args:
        z: `(tokens, r)`, any strides.
        gate: logits `(tokens, N)`, any strides; gates `(N,)`, which get no gradient; None where all are 1.
        seed, dropout: of the mask; seed None without one.
        scale: factor of everything that the heads write.
        z_0: a start's ranks, with z's strides; they are written behind the heads', times `start`.
        at: columns where z, gate and z_0 begin in the tensors given for them: wider ones spare the program the views.
    """

    r: int
    N: int
    z: Tensor
    gate: Tensor | None
    seed: Tensor | None
    dropout: float
    scale: float = 1.0
    z_0: Tensor | None = None
    start: float = 0.0
    at: tuple[int, int, int] = (0, 0, 0)


def spread(ranks: Ranks, h: Tensor) -> None:
    """Writes h, `(tokens, N r)` and the start's r columns, any strides."""
    z, gate, z_0, seed = _pointers(ranks)
    strides = (*z.stride(), *_gate_strides(ranks.gate), *h.stride())
    _launch(_forward, ranks, (z, gate, z_0, seed, h), strides)


def gather(
    ranks: Ranks, dh: Tensor, dz: Tensor, dgate: Tensor, dz_0: Tensor | None = None, h: Tensor | None = None
) -> None:
    """Writes what comes back from dh: dz `(tokens, r)`, dgate `(tokens, N)` if there are logits, dz_0 `(tokens, r)` if
    there is a start, in dz's strides, each from the column on where what it belongs to begins (`Ranks.at`); and, if h
    is given, the heads' part of h once more, in dh's strides."""
    z, gate, _, seed = _pointers(ranks)
    pointers = (dh, z, gate, seed, dz, dgate, dz if dz_0 is None else dz_0, dh if h is None else h)
    of_gate = dgate.stride() if dgate.dim() == 2 else (0, 0)
    strides = (*dh.stride(), *z.stride(), *_gate_strides(ranks.gate), *dz.stride(), *of_gate)
    _launch(_backward, ranks, pointers, strides, AGAIN=h is not None)


def _pointers(ranks: Ranks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is missing is not read, but a pointer must be there."""
    z, gate, z_0, seed = ranks.z, ranks.gate, ranks.z_0, ranks.seed
    return z, z if gate is None else gate, z if z_0 is None else z_0, z if seed is None else seed


def _gate_strides(gate: Tensor | None) -> tuple[int, int]:
    if gate is None:
        return 0, 0
    return (0, gate.stride(0)) if gate.dim() == 1 else (gate.stride(0), gate.stride(1))


def _launch(kernel: Any, ranks: Ranks, tensors: tuple[Tensor, ...], strides: tuple[int, ...], **constants: Any) -> None:
    tokens = ranks.z.shape[0]
    if tokens == 0:
        return
    blocks = _blocks(ranks.r, ranks.N)
    with on_device_of(ranks.z):
        kernel[(-(-tokens // blocks["TOKENS"]),)](
            *tensors,
            *ranks.at,
            tokens,
            ranks.r,
            ranks.N,
            *strides,
            threshold(ranks.dropout),
            SCALE=ranks.scale,
            START=ranks.start if ranks.z_0 is not None else 0.0,
            DROPS=ranks.seed is not None,
            GATE=2 if ranks.gate is None else 2 - ranks.gate.dim(),
            WIDE=wide(ranks.z),
            enable_fp_fusion=True,
            **blocks,
            **constants,
        )


@functools.cache
def _blocks(r: int, N: int) -> dict[str, int]:
    HEADS, RANKS = triton.next_power_of_2(N), triton.next_power_of_2(r)
    return {"HEADS": HEADS, "RANKS": RANKS, "TOKENS": max(16, min(128, ELEMENTS // max(HEADS, RANKS)))}
