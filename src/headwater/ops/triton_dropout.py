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
def _keep_mask(
    seed, out, rows, columns, size, first, limit, BY_COLUMN: tl.constexpr, ENTRIES: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    place = (at % rows) * columns + at // rows if BY_COLUMN else at
    tl.store(out + at, keeps(seed, (place.to(tl.int32) + first) * M0, limit).to(tl.int8), mask=at < size)


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


def int32(value: int) -> int:
    """A whole number modulo 2^32, as int32."""
    return (value + 2**31) % 2**32 - 2**31


@torch.library.custom_op("headwater::keep_mask", mutates_args=())
def keep_mask(seed: Tensor, rows: int, columns: int, p: float, first_row: int, by_column: bool) -> Tensor:
    """`dropout.keep_mask`."""
    require_gpu(seed)
    kept = _empty(seed, rows, columns, by_column)
    size = rows * columns
    if size:
        with torch.cuda.device_of(seed):  # a kernel starts on the current device, which need not be the tensor's
            _keep_mask[(triton.cdiv(size, ENTRIES),)](
                seed,
                kept.view(torch.int8),
                rows,
                columns,
                size,
                int32(first_row * columns),
                threshold(p),
                BY_COLUMN=by_column,
                ENTRIES=ENTRIES,
                enable_fp_fusion=True,
            )
    return kept.T if by_column else kept


@keep_mask.register_fake
def _(seed: Tensor, rows: int, columns: int, p: float, first_row: int, by_column: bool) -> Tensor:
    kept = _empty(seed, rows, columns, by_column)
    return kept.T if by_column else kept


def _empty(seed: Tensor, rows: int, columns: int, by_column: bool) -> Tensor:
    return seed.new_empty((columns, rows) if by_column else (rows, columns), dtype=torch.bool)
