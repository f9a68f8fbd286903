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
    h, dh  (tokens, N r) in z's dtype; head n's ranks are columns n r to (n + 1) r, and the mask is the
           transpose of `dropout.keep_mask(seed, N r, tokens, p)`
    h, dz, dgate are laid out feature by feature: transposes of contiguous (columns, tokens)
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import implementation
from .dropout import drop, keep_mask
from .lowrank import FEW, cast, spread_heads, widened


@functools.cache
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
    if seed is None and not torch.is_grad_enabled() and z.shape[0] <= FEW:
        return reference(z, gate, seed, dropout)  # decoding, where every call counts
    chosen = implementation(z.device)
    if chosen == "reference":
        return reference(z, gate, seed, dropout)
    if not torch.compiler.is_compiling():  # PyTorch's dispatcher would cost more than the work
        if not torch.is_grad_enabled():
            return _kernels(chosen).forward(z, gate, seed, dropout)
        if chosen == "autograd":
            return _Eager.apply(z, gate, seed, dropout)
    return _gated_heads(z, gate, seed, dropout)


def reference(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """The equation, through plain autograd."""
    wide = widened(z)
    gate = cast(gate, wide.dtype)
    h = spread_heads(wide, torch.softmax(gate, dim=-1) if gate.dim() == 2 else gate.detach())
    return cast(h if seed is None else drop(h.T, seed, dropout).T, z.dtype)


def forward(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """The `autograd` implementation's forward."""
    return _spread(*_prepare(z, gate, seed, dropout)).to(z.dtype).T


def backward(dh: Tensor, z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """The `autograd` implementation's backward: dz and dgate."""
    dz, dgate = _gather(dh, gate.dim() == 1, *_prepare(z, gate, seed, dropout))
    scale = 1.0 if seed is None else 1 / (1 - dropout)
    dgate = dgate.to(gate.dtype)
    return (dz * scale).to(z.dtype).T, dgate.T if gate.dim() == 2 else dgate


# All of this works feature by feature: tokens are the long, contiguous dimension.


def _prepare(z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """`z / (1 - p)` as `(r, tokens)`; the gates `(N, tokens)`, or `(N, 1)` where they are fixed; the mask."""
    wide = torch.promote_types(z.dtype, torch.float32)
    g = gate.to(wide)
    g = torch.softmax(g.T, dim=0) if gate.dim() == 2 else g.unsqueeze(1)
    if seed is None:
        return z.T.to(wide).contiguous(), g, None
    columns = gate.shape[-1] * z.shape[1]
    kept = keep_mask(seed, columns, z.shape[0], dropout).to(wide)
    return z.T.to(wide) * (1 / (1 - dropout)), g, kept


def _spread(z: Tensor, g: Tensor, kept: Tensor | None) -> Tensor:
    h = (g.unsqueeze(1) * z).flatten(0, 1)  # (N r, tokens)
    return h if kept is None else h.mul_(kept)


def _gather(dh: Tensor, fixed: bool, z: Tensor, g: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    u = dh.T.to(z.dtype)
    u = (u if kept is None else u * kept).unflatten(0, (g.shape[0], -1))  # (N, r, tokens)
    dz = (g.unsqueeze(1) * u).sum(0)
    dg = g.new_empty(0) if fixed else (u * z).sum(1)
    return dz, dg if fixed else g * (dg - (g * dg).sum(0))


class _Eager(torch.autograd.Function):
    """`forward` and `backward` outside compiled graphs. The mask is kept: the graph around it lives for a moment only,
    in the backward of `fused`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gate: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
        prepared = _prepare(z, gate, seed, dropout)
        ctx.save_for_backward(*prepared)
        ctx.fixed, ctx.scale = gate.dim() == 1, 1.0 if seed is None else 1 / (1 - dropout)
        ctx.dtypes = z.dtype, gate.dtype
        return _spread(*prepared).to(z.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        dz, dgate = _gather(dh, ctx.fixed, *ctx.saved_tensors)
        return (dz * ctx.scale).to(ctx.dtypes[0]).T, None if ctx.fixed else dgate.to(ctx.dtypes[1]).T, None, None


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
