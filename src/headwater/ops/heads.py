"""Ranks spread over gated heads, each under its own dropout mask: the inner part of R-LoRA, HydraLoRA and M-LoRA.

    g = softmax(gate)               h_n = g_n * D_n * z                         n = 1..N, in rank space

Three implementations of one signature: `reference`, plain autograd as the equation reads; `autograd`, forward and
backward by hand in torch operations; `triton`, the same two as kernels. Which one runs is `implementation`'s choice by
device, and `HEADWATER_OPS=reference|autograd|triton` forces it. All draw the same masks from the same seed (`dropout`),
and keep nothing for backward but z, gate and the seed.

The contract of a pair of kernels, in any implementation:

    forward(z, gate, seed, dropout) -> h                    backward(dh, z, gate, seed, dropout) -> (dz, dgate)

    z      (tokens, r), any strides, any floating dtype; computed in float32 at least
    gate   (tokens, N): logits, softmaxed here; or (N,): the gates themselves, which get no gradient (dgate is empty)
    seed   int64, one element, on z's device; None without dropout
    h, dh  (tokens, N r) in z's dtype; head n's ranks are columns n r to (n + 1) r, and entry (t, c) of the mask is
           entry t N r + c of `dropout.keep_mask(seed, tokens, N r, p)`
    h, dz, dgate are laid out feature by feature: transposes of contiguous (columns, tokens)
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .dispatch import implementation
from .dropout import drop, keep_mask
from .lowrank import spread_heads


def _kernels(chosen: str) -> Any:
    return importlib.import_module(".triton_heads" if chosen == "triton" else ".heads", __package__)


def gated_heads(z: Tensor, gate: Tensor, *, seed: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """`h_n = softmax(gate)_n * D_n * z` for N heads; shapes and dtypes as above.

    Args:
        seed: None switches dropout off.
        dropout: probability of zeroing one rank of one head for one token; kept values are divided by `1 - dropout`.

    Returns:
        h, `(tokens, N r)`.
    """
    if seed is None or dropout == 0:
        seed, dropout = None, 0.0
    chosen = implementation(z.device)
    if chosen == "reference":
        return reference(z, gate, seed, dropout)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _kernels(chosen).forward(z, gate, seed, dropout)  # PyTorch's dispatcher would cost more than the work
    return _gated_heads(z, gate, seed, dropout)


def reference(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """The equation, through plain autograd."""
    wide = torch.promote_types(z.dtype, torch.float32)
    gate = torch.softmax(gate.to(wide), dim=-1) if gate.dim() == 2 else gate.detach().to(wide)
    h = spread_heads(z.to(wide), gate)
    return (h if seed is None else drop(h, seed, dropout)).to(z.dtype)


def forward(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """The `autograd` implementation's forward. Works feature by feature: tokens are the long, contiguous dimension."""
    zf, g = _by_feature(z, gate)
    h = (g.unsqueeze(1) * (zf / (1 - dropout))).flatten(0, 1)  # (N r, tokens)
    if seed is not None:
        h *= keep_mask(seed, z.shape[0], h.shape[0], dropout, by_column=True).T
    return h.to(z.dtype).T


def backward(dh: Tensor, z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """The `autograd` implementation's backward: dz and dgate."""
    zf, g = _by_feature(z, gate)
    u = dh.T.to(zf.dtype)
    if seed is not None:
        u = u * keep_mask(seed, z.shape[0], dh.shape[1], dropout, by_column=True).T
    u = u.unflatten(0, (g.shape[0], -1)) / (1 - dropout)  # (N, r, tokens)
    dz = (g.unsqueeze(1) * u).sum(0)
    if gate.dim() == 1:
        return dz.to(z.dtype).T, gate.new_empty(0)
    dg = (u * zf).sum(1)
    dgate = g * (dg - (g * dg).sum(0))
    return dz.to(z.dtype).T, dgate.to(gate.dtype).T


def _by_feature(z: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """z as `(r, tokens)` and the gates as `(N, tokens)`, or `(N, 1)` where they are fixed."""
    wide = torch.promote_types(z.dtype, torch.float32)
    g = gate.to(wide)
    return z.T.to(wide).contiguous(), torch.softmax(g.T, dim=0) if gate.dim() == 2 else g.unsqueeze(1)


@torch.library.custom_op("headwater::gated_heads", mutates_args=())
def _gated_heads(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    return _kernels(implementation(z.device)).forward(z, gate, seed, dropout)


@torch.library.custom_op("headwater::gated_heads_backward", mutates_args=())
def _gated_heads_backward(
    dh: Tensor, z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    return _kernels(implementation(z.device)).backward(dh, z, gate, seed, dropout)


@_gated_heads.register_fake
def _(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    return z.new_empty(gate.shape[-1] * z.shape[1], z.shape[0]).T


@_gated_heads_backward.register_fake
def _(dh: Tensor, z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    dgate = gate.new_empty(0) if gate.dim() == 1 else gate.new_empty(gate.shape[::-1]).T
    return z.new_empty(z.shape[::-1]).T, dgate


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, gate, seed, ctx.dropout = inputs
    ctx.save_for_backward(z, gate, seed)


def _differentiate(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    z, gate, seed = ctx.saved_tensors
    dz, dgate = _gated_heads_backward(dh, z, gate, seed, ctx.dropout)
    return dz, dgate if gate.dim() == 2 else None, None, None


_gated_heads.register_autograd(_differentiate, setup_context=_save)
