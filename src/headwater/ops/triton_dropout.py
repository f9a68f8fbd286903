"""`dropout.drop` as one Triton kernel: an entry is read, hashed, and written, and no mask exists in memory.

The gradient of a dropped tensor is the gradient dropped by the same seed, so forward and backward are one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import HeadwaterError, Problem
from . import dropout
from .dropout import threshold

M0, M1, M2 = tl.constexpr(dropout.M0), tl.constexpr(dropout.M1), tl.constexpr(dropout.M2)
ENTRIES = 1024


@triton.jit
def keeps(seed, spread, limit):
    """Whether entries are kept, as `dropout.keep_mask` says; `spread` is their place times M0, int32."""
    bits = tl.load(seed)
    h = spread + (bits & 0x7FFFFFFF).to(tl.int32)
    h = h ^ (h >> 16)
    h = h * M1
    h = h ^ ((bits >> 31) & 0x7FFFFFFF).to(tl.int32)
    h = h ^ (h >> 15)
    h = h * M2
    return h < limit


@triton.jit
def _drop(values, seed, out, size, first, limit, SCALE: tl.constexpr, WIDE: tl.constexpr, ENTRIES: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    known = place < size
    value = tl.load(values + place, mask=known, other=0.0).to(WIDE) * tl.full([1], SCALE, WIDE)
    kept = keeps(seed, (place.to(tl.int32) + first) * M0, limit)
    tl.store(out + place, tl.where(kept, value, 0.0), mask=known)


def require_gpu(tensor: Tensor) -> None:
    """
    Raises:
        HeadwaterError: if Triton can run nothing on this tensor.
    """
    if tensor.device.type == "cpu" and isinstance(_drop, triton.JITFunction):  # not wrapped by the interpreter
        raise HeadwaterError(
            Problem(
                "Triton's kernels need a GPU, and this tensor is on the CPU",
                "HEADWATER_OPS",
                "leave HEADWATER_OPS unset, or set TRITON_INTERPRET=1 to check the kernels without one",
            )
        )


def wide(tensor: Tensor) -> Any:
    """Triton's type for sums over a tensor's values."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def int32(value: int) -> int:
    """A whole number modulo 2^32, as int32."""
    return (value + 2**31) % 2**32 - 2**31


@torch.library.custom_op("headwater::drop", mutates_args=())
def drop(values: Tensor, seed: Tensor, p: float, first_row: int) -> Tensor:
    """`dropout.drop`, contiguous."""
    require_gpu(values)
    values = values.contiguous()
    out = torch.empty_like(values)
    if out.numel():
        with torch.cuda.device_of(values):  # a kernel starts on the current device, which need not be the tensor's
            _drop[(triton.cdiv(out.numel(), ENTRIES),)](
                values,
                seed,
                out,
                out.numel(),
                int32(first_row * values.shape[1]),
                threshold(p),
                SCALE=1 / (1 - p),
                WIDE=wide(values),
                ENTRIES=ENTRIES,
                enable_fp_fusion=True,
            )
    return out


@drop.register_fake
def _(values: Tensor, seed: Tensor, p: float, first_row: int) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p, ctx.first_row = inputs
    ctx.save_for_backward(seed)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return drop(grad, *ctx.saved_tensors, ctx.p, ctx.first_row), None, None, None


drop.register_autograd(_differentiate, setup_context=_save)
