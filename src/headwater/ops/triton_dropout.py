"""Dropout as Triton kernels: `dropout.keep_mask`, and x under its mask without a mask in memory.

Each passes once over tensors as large as x, where torch would pass over int32 tensors of that size ten times. What the
kernels of `triton_heads` share with them is here, too.
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
TURN = tl.constexpr(dropout.TURN)
ENTRIES = 1024


@triton.jit
def keeps(seed, place, limit):
    """Whether entries are kept, as `dropout.keep_mask` says; `place` is their number, int64."""
    bits = tl.load(seed)
    h = (place >> 2).to(tl.int32) * M0 + (bits & 0x7FFFFFFF).to(tl.int32)
    h = h ^ (h >> 16)
    h = h * M1
    h = h ^ ((bits >> 31) & 0x7FFFFFFF).to(tl.int32)
    h = h ^ (h >> 16)
    h = h * M2
    byte = (h >> ((place & 3) * 8).to(tl.int32)) & 255
    return byte * 256 + (((place + (bits >> 54)) * TURN) & 255).to(tl.int32) >= limit


@triton.jit
def _keep_mask(seed, out, size, first, limit, ENTRIES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    tl.store(out + at, keeps(seed, at + first, limit).to(tl.int8), mask=at < size)


@triton.jit
def _dropped(seed, x, out, size, first, limit, ENTRIES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    values = tl.load(x + at, mask=at < size, other=0.0)
    tl.store(out + at, tl.where(keeps(seed, at + first, limit), values, 0.0), mask=at < size)


@triton.jit
def _add_back(seed, back, dx, x, size, first, limit, WIDE: tl.constexpr, ENTRIES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    kept = keeps(seed, at + first, limit)
    total = tl.load(dx + at, mask=at < size, other=0.0).to(WIDE)
    total += tl.where(kept, tl.load(back + at, mask=at < size, other=0.0).to(WIDE), 0.0)
    tl.store(dx + at, total, mask=at < size)
    tl.store(back + at, tl.where(kept, tl.load(x + at, mask=at < size, other=0.0), 0.0), mask=at < size)


def dropped(x: Tensor, seed: Tensor, p: float, first_row: int) -> Tensor:
    """x `(rows, columns)` with the entries that `keep_mask` drops at 0; the others are not scaled."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _over(_dropped, x, (seed, x, out), p, first_row)
    return out


def add_back(dx: Tensor, back: Tensor, x: Tensor, seed: Tensor, p: float, first_row: int) -> None:
    """Adds `back` under the mask to dx, in place, and leaves x under the mask in `back`; all `(rows, columns)`, dx and
    `back` contiguous."""
    _over(_add_back, x, (seed, back, dx, x.contiguous()), p, first_row, WIDE=wide(x))


def _over(kernel: Any, x: Tensor, tensors: tuple[Tensor, ...], p: float, first_row: int, **constants: Any) -> None:
    require_gpu(x)
    if x.numel():
        with torch.cuda.device_of(x):  # a kernel starts on the current device, which need not be the tensor's
            kernel[(triton.cdiv(x.numel(), ENTRIES),)](
                *tensors,
                x.numel(),
                first_row * x.shape[1],
                threshold(p),
                ENTRIES=ENTRIES,
                enable_fp_fusion=True,
                **constants,
            )


def require_gpu(tensor: Tensor) -> None:
    """
    Raises:
        HeadwaterError: if Triton can run nothing on this tensor.
    """
    if tensor.device.type == "cpu" and isinstance(_keep_mask, triton.JITFunction):  # not wrapped by the interpreter
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


@torch.library.custom_op("headwater::keep_mask", mutates_args=())
def keep_mask(seed: Tensor, rows: int, columns: int, p: float, first_row: int) -> Tensor:
    """`dropout.keep_mask`."""
    kept = seed.new_empty(rows, columns, dtype=torch.bool)
    out = kept.view(torch.int8)
    _over(_keep_mask, out, (seed, out), p, first_row)
    return kept


@keep_mask.register_fake
def _(seed: Tensor, rows: int, columns: int, p: float, first_row: int) -> Tensor:
    return seed.new_empty(rows, columns, dtype=torch.bool)
