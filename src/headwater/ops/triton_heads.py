"""The kernels of `heads` in Triton: one launch forward, one backward, whatever the number of heads.

Both go over blocks of tokens with all of a token's gates and ranks at hand, so the softmax, the mask, the sum over
heads and the softmax's derivative stay in registers; z, the gate and the seed are read, and only h, dz and dgate are
written. All sums are in float32, in float64 for float64. The masks are those of `dropout`.

`forward` and `backward` are the contract of `heads`, whose results lie feature by feature. `spread` and `gather` are
the same kernels for `by_kernels`: they write into given columns, and know a frozen start beside the heads.
`tests/ops/triton_cases.py` checks them without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import threshold
from .triton_dropout import keeps, require_gpu, wide

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


@triton.jit
def _forward(
    z, z_0, gate, seed, h, tokens, r, N,
    stride_zt, stride_zr, stride_gt, stride_gn, stride_ht, stride_hc, limit,
    SCALE: tl.constexpr, START: tl.constexpr, DROPS: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr,
    HEADS: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def _backward(
    dh, z, gate, seed, dz, dz_0, dgate, h, tokens, r, N,
    stride_ht, stride_hc, stride_zt, stride_zr, stride_gt, stride_gn,
    stride_dzt, stride_dzr, stride_dgt, stride_dgn, limit,
    SCALE: tl.constexpr, START: tl.constexpr, DROPS: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr,
    AGAIN: tl.constexpr, HEADS: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
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


@dataclass(frozen=True)
class Ranks:
    """What the kernels read.

    Args:
        z: `(tokens, r)`, any strides.
        gate: logits `(tokens, N)`, any strides; gates `(N,)`, which get no gradient; None where all are 1.
        seed, dropout: of the mask; seed None without one.
        scale: factor of everything that the heads write.
        z_0: a start's ranks, with z's strides; they are written behind the heads', times `start`.
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


def spread(ranks: Ranks, h: Tensor) -> None:
    """Writes h, `(tokens, N r)` and the start's r columns, any strides."""
    z_0 = ranks.z if ranks.z_0 is None else ranks.z_0
    pointers = (ranks.z, z_0, *_gate_and_seed(ranks), h)
    _launch(_forward, ranks, pointers, (*ranks.z.stride(), *_gate_strides(ranks.gate), *h.stride()))


def gather(
    ranks: Ranks, dh: Tensor, dz: Tensor, dgate: Tensor, dz_0: Tensor | None = None, h: Tensor | None = None
) -> None:
    """Writes what comes back from dh: dz `(tokens, r)`, dgate `(tokens, N)` if there are logits, dz_0 `(tokens, r)` if
    there is a start, in dz's strides; and, if h is given, the heads' part of h once more, in dh's strides."""
    pointers = (dh, ranks.z, *_gate_and_seed(ranks), dz, dz if dz_0 is None else dz_0, dgate, dh if h is None else h)
    strides = (*dh.stride(), *ranks.z.stride(), *_gate_strides(ranks.gate), *dz.stride())
    of_gate = dgate.stride() if dgate.dim() == 2 else (0, 0)
    _launch(_backward, ranks, pointers, (*strides, *of_gate), AGAIN=h is not None)


def _gate_and_seed(ranks: Ranks) -> tuple[Tensor, Tensor]:
    """What is missing is not read, but a pointer must be there."""
    return ranks.z if ranks.gate is None else ranks.gate, ranks.z if ranks.seed is None else ranks.seed


def _gate_strides(gate: Tensor | None) -> tuple[int, int]:
    if gate is None:
        return 0, 0
    return (0, gate.stride(0)) if gate.dim() == 1 else (gate.stride(0), gate.stride(1))


def _launch(kernel: Any, ranks: Ranks, tensors: tuple[Tensor, ...], strides: tuple[int, ...], **constants: Any) -> None:
    tokens = ranks.z.shape[0]
    require_gpu(ranks.z)
    if tokens == 0:
        return
    HEADS, RANKS = triton.next_power_of_2(ranks.N), triton.next_power_of_2(ranks.r)
    TOKENS = max(16, min(128, ELEMENTS // max(HEADS, RANKS)))
    with torch.cuda.device_of(ranks.z):  # a kernel starts on the current device, which need not be the tensor's
        kernel[(triton.cdiv(tokens, TOKENS),)](
            *tensors,
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
            HEADS=HEADS,
            RANKS=RANKS,
            TOKENS=TOKENS,
            enable_fp_fusion=True,
            **constants,
        )
