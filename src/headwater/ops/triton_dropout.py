"""`dropout.keep_mask` as one Triton kernel: a mask as large as x is written once, where torch would pass over int32
tensors of that size ten times. What the kernels of `triton_heads` share with it is here, too.
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
def keeps(seed, place, limit):
    """Whether entries are kept, as `dropout.keep_mask` says; `place` is their number, int64."""
    bits = tl.load(seed)
    h = (place >> 1).to(tl.int32) * M0 + (bits & 0x7FFFFFFF).to(tl.int32)
    h = h ^ (h >> 16)
    h = h * M1
    h = h ^ ((bits >> 31) & 0x7FFFFFFF).to(tl.int32)
    h = h ^ (h >> 15)
    h = h * M2
    return tl.where((place & 1) == 1, h >> 16, (h << 16) >> 16) < limit


@triton.jit
def _keep_mask(seed, out, size, first, limit, ENTRIES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    tl.store(out + at, keeps(seed, at + first, limit).to(tl.int8), mask=at < size)


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
    require_gpu(seed)
    kept = seed.new_empty(rows, columns, dtype=torch.bool)
    size = rows * columns
    if size:
        with torch.cuda.device_of(seed):  # a kernel starts on the current device, which need not be the tensor's
            _keep_mask[(triton.cdiv(size, ENTRIES),)](
                seed,
                kept.view(torch.int8),
                size,
                first_row * columns,
                threshold(p),
                ENTRIES=ENTRIES,
                enable_fp_fusion=True,
            )
    return kept


@keep_mask.register_fake
def _(seed: Tensor, rows: int, columns: int, p: float, first_row: int) -> Tensor:
    return seed.new_empty(rows, columns, dtype=torch.bool)
