"""The kernels of `heads` in Triton: one launch forward, one backward, whatever the number of heads.

Both go over blocks of tokens with all of a token's gates and ranks at hand, so the softmax, the mask, the sum over
heads and the softmax's derivative stay in registers; z, the gate and the seed are read, and only h, dz and dgate are
written. Results lie feature by feature, `(columns, tokens)`, so that neighbouring threads write neighbouring places.
All sums are in float32, in float64 for float64. The masks are those of `dropout`.

See `heads` for the contract, and `tests/ops/triton_cases.py` for how it is checked without a GPU.
"""

from __future__ import annotations

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
def _gates(gate, token, inside, head, stride_t, stride_n, N, FIXED: tl.constexpr, WIDE: tl.constexpr):
    """The gates of a block of tokens, `(heads, tokens)`; 0 beyond the last head."""
    known = (head < N)[:, None] & inside[None, :]
    values = tl.load(gate + head[:, None] * stride_n + token[None, :] * stride_t, mask=known, other=0.0).to(WIDE)
    if FIXED:
        return values
    values = tl.where((head < N)[:, None], values, float("-inf"))
    values = tl.exp(values - tl.max(values, axis=0)[None, :])
    return values / tl.sum(values, axis=0)[None, :]


@triton.jit
def _forward(
    z, gate, seed, h, tokens, r, N, stride_zt, stride_zr, stride_gt, stride_gn, limit,
    SCALE: tl.constexpr, DROPS: tl.constexpr, FIXED: tl.constexpr, WIDE: tl.constexpr,
    HEADS: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    rank, head = tl.arange(0, RANKS), tl.arange(0, HEADS)
    known = (rank < r)[:, None] & inside[None, :]
    ranks = tl.load(z + rank[:, None] * stride_zr + token[None, :] * stride_zt, mask=known, other=0.0).to(WIDE)
    ranks = ranks * tl.full([1, 1], SCALE, WIDE)
    g = _gates(gate, token, inside, head, stride_gt, stride_gn, N, FIXED, WIDE)
    for n in range(N):
        g_n = tl.sum(tl.where((head == n)[:, None], g, 0.0), axis=0)
        values = ranks * g_n[None, :]
        column = n * r + rank
        if DROPS:
            values = tl.where(keeps(seed, column.to(tl.int64)[:, None] * tokens + token[None, :], limit), values, 0.0)
        tl.store(h + column.to(tl.int64)[:, None] * tokens + token[None, :], values, mask=known)


@triton.jit
def _backward(
    dh, z, gate, seed, dz, dgate, tokens, r, N,
    stride_ht, stride_hc, stride_zt, stride_zr, stride_gt, stride_gn, limit,
    SCALE: tl.constexpr, DROPS: tl.constexpr, FIXED: tl.constexpr, WIDE: tl.constexpr,
    HEADS: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < tokens
    rank, head = tl.arange(0, RANKS), tl.arange(0, HEADS)
    known = (rank < r)[:, None] & inside[None, :]
    g = _gates(gate, token, inside, head, stride_gt, stride_gn, N, FIXED, WIDE)
    d_ranks = tl.zeros([RANKS, TOKENS], WIDE)
    if not FIXED:
        ranks = tl.load(z + rank[:, None] * stride_zr + token[None, :] * stride_zt, mask=known, other=0.0).to(WIDE)
        dg = tl.zeros([HEADS, TOKENS], WIDE)
    for n in range(N):
        column = n * r + rank
        place = column.to(tl.int64)[:, None] * stride_hc + token[None, :] * stride_ht
        u = tl.load(dh + place, mask=known, other=0.0).to(WIDE) * tl.full([1, 1], SCALE, WIDE)
        if DROPS:
            u = tl.where(keeps(seed, column.to(tl.int64)[:, None] * tokens + token[None, :], limit), u, 0.0)
        here = (head == n)[:, None]
        d_ranks += u * tl.sum(tl.where(here, g, 0.0), axis=0)[None, :]
        if not FIXED:
            dg = tl.where(here, tl.sum(u * ranks, axis=0)[None, :], dg)
    tl.store(dz + rank.to(tl.int64)[:, None] * tokens + token[None, :], d_ranks, mask=known)
    if not FIXED:
        d_logits = g * (dg - tl.sum(g * dg, axis=0)[None, :])
        written = (head < N)[:, None] & inside[None, :]
        tl.store(dgate + head.to(tl.int64)[:, None] * tokens + token[None, :], d_logits, mask=written)


def forward(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """h, `(tokens, N r)`; see `heads`."""
    (tokens, r), N = z.shape, gate.shape[-1]
    h = z.new_empty(N * r, tokens)
    _launch(_forward, (z, gate, _or_any(seed, z), h), z, gate, seed, dropout, ())
    return h.T


def backward(dh: Tensor, z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """dz `(tokens, r)` and dgate `(tokens, N)`, empty where gates are fixed; see `heads`."""
    dz = z.new_empty(z.shape[::-1])
    dgate = gate.new_empty(0) if gate.dim() == 1 else gate.new_empty(gate.shape[::-1])
    _launch(_backward, (dh, z, gate, _or_any(seed, z), dz, dgate), z, gate, seed, dropout, dh.stride())
    return dz.T, dgate if gate.dim() == 1 else dgate.T


def _or_any(seed: Tensor | None, z: Tensor) -> Tensor:
    return z if seed is None else seed  # not read without dropout, but a pointer must be there


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    z: Tensor,
    gate: Tensor,
    seed: Tensor | None,
    dropout: float,
    strides: tuple[int, ...],
) -> None:
    (tokens, r), N = z.shape, gate.shape[-1]
    require_gpu(z)
    if tokens == 0:
        return
    HEADS, RANKS = triton.next_power_of_2(N), triton.next_power_of_2(r)
    TOKENS = max(16, min(128, ELEMENTS // max(HEADS, RANKS)))
    stride_gt, stride_gn = (0, gate.stride(0)) if gate.dim() == 1 else gate.stride()
    with torch.cuda.device_of(z):  # a kernel starts on the current device, which need not be the tensor's
        kernel[(triton.cdiv(tokens, TOKENS),)](
            *tensors,
            tokens,
            r,
            N,
            *strides,
            *z.stride(),
            stride_gt,
            stride_gn,
            threshold(dropout),
            SCALE=1 / (1 - dropout),
            DROPS=seed is not None,
            FIXED=gate.dim() == 1,
            WIDE=wide(z),
            HEADS=HEADS,
            RANKS=RANKS,
            TOKENS=TOKENS,
            enable_fp_fusion=True,
        )
