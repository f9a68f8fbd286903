"""Dropout as Triton kernels: `dropout.keep_mask`, and products with x under its mask that never hold it in memory.

Behind a dropout on x, a layer reads `u = (mask * x) A^T`; backward adds `mask * (du A)` to dx and needs
`dA = du^T (mask * x)`. Each direction is one pass over tensors as wide as x here, the masks drawn on the way; as
operations of torch with a mask drawn apart it would be five to ten. What the kernels of `triton_heads` share with
them is here, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import HeadwaterError, Problem
from .dropout import threshold

ENTRIES = 1024
PROGRAMS = 1024  # as many of `_add_back` as keep a GPU busy
# By whether x's entries are of 16 bits, as of others fewer fit into a program's registers: blocks of x, and the most
# ranks of one launch.
MOST_RANKS = {True: 64, False: 16}
READ = {
    True: {"TOKENS": 32, "COLUMNS": 128, "num_warps": 4, "num_stages": 3},
    False: {"TOKENS": 32, "COLUMNS": 64, "num_warps": 4, "num_stages": 2},
}
BACK = {
    True: {"TOKENS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 1},
    False: {"TOKENS": 32, "COLUMNS": 64, "num_warps": 4, "num_stages": 2},
}


@triton.jit
def keeps(seed, first, at, limit, ALIGNED: tl.constexpr):
    """Whether entries are kept, as `dropout.keep_mask` says: those whose numbers are `first + at`, int64 and int32.

    The wide numbers are only in `first`, which few entries have to themselves. ALIGNED says that it is a multiple of 4:
    entries of one word then have one `at >> 2`, and the compiler sees that their hash is the same. The factors are
    dropout's M0, M1, M2 and TURN; Triton would look up names of other modules at every launch.
    """
    bits = tl.load(seed)
    turn = (first + (bits >> 54)).to(tl.int32) & 255
    if not ALIGNED:
        at += (first & 3).to(tl.int32)
        turn -= (first & 3).to(tl.int32)
    h = ((first >> 2).to(tl.int32) * -1640531527 + (bits & 0x7FFFFFFF).to(tl.int32)) + (at >> 2) * -1640531527
    h = h ^ (h >> 16)
    h = h * 0x21F0AAAD
    h = h ^ ((bits >> 31) & 0x7FFFFFFF).to(tl.int32)
    h = h ^ (h >> 16)
    h = h * 0x735A2D97
    byte = (h >> ((at & 3) * 8)) & 255
    return byte * 256 + ((turn * 159 + at * 159) & 255) >= limit


@triton.jit
def _keep_mask(seed, out, size, first, limit, ALIGNED: tl.constexpr, ENTRIES: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * ENTRIES
    at = tl.arange(0, ENTRIES)
    kept = keeps(seed, start + first, at, limit, ALIGNED)
    tl.store(out + start + at, kept.to(tl.int8), mask=start + at < size)


@triton.jit
def _read(
    seed, x, down, clean, u, of_clean, masks, tokens, columns, r, k,
    stride_ut, stride_um, stride_ur, stride_ct, stride_cr, limit, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """u of a block of tokens behind one mask, and, with CLEAN, what `clean` reads. The masks of a block of tokens come
    one after the other, so that x is in the cache from the second on; in one row, as a GPU's grid has no room for
    millions of tokens in its others."""
    mask = (tl.program_id(0) % masks).to(tl.int64)
    token = (tl.program_id(0) // masks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside, rank = token < tokens, tl.arange(0, RANKS)
    first = (mask * tokens + token) * columns
    total = tl.zeros([TOKENS, RANKS], WIDE)
    if CLEAN:
        row = tl.arange(0, CLEAN)
        plain = tl.zeros([TOKENS, CLEAN], WIDE)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = (column < columns)[:, None]
        values = tl.load(
            x + (token * columns)[:, None] + column[None, :],
            mask=inside[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        kept = keeps(seed, first[:, None], column[None, :], limit, ALIGNED)
        seen = tl.where(kept, values, 0.0).to(values.dtype)
        place = rank.to(tl.int64)[None, :] * columns + column[:, None]
        weight = tl.load(down + place, mask=(rank < r)[None, :] & there, other=0.0)
        total = tl.dot(seen, weight, total, input_precision="ieee", out_dtype=WIDE)
        if CLEAN:
            place = row.to(tl.int64)[None, :] * columns + column[:, None]
            weight = tl.load(clean + place, mask=(row < k)[None, :] & there, other=0.0)
            plain = tl.dot(values, weight, plain, input_precision="ieee", out_dtype=WIDE)
    place = mask * stride_um + token[:, None] * stride_ut + rank.to(tl.int64)[None, :] * stride_ur
    tl.store(u + place, total, mask=inside[:, None] & (rank < r)[None, :])
    if CLEAN:
        known = inside[:, None] & (row < k)[None, :] & (mask + tl.zeros([1, 1], tl.int64) == 0)  # once
        tl.store(of_clean + token[:, None] * stride_ct + row.to(tl.int64)[None, :] * stride_cr, plain, mask=known)


@triton.jit
def _add_back(
    seed, x, down, clean, du, d_clean, dx, found, found_clean, tokens, columns, r, k, first_row,
    stride_ut, stride_ur, stride_ct, stride_cr, stride_part, stride_clean, limit,
    ADDS: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """Through one mask and, with CLEAN, beside it, a block of columns and STEPS blocks of tokens: adds to dx, and gives
    parts of the sums that the down-projections' gradients are."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank, there = tl.arange(0, RANKS), (column < columns)[None, :]
    of_rank = (rank < r)[:, None] & there
    weight = tl.load(down + rank.to(tl.int64)[:, None] * columns + column[None, :], mask=of_rank, other=0.0)
    total = tl.zeros([RANKS, COLUMNS], WIDE)
    if CLEAN:
        row = tl.arange(0, CLEAN)
        of_row = (row < k)[:, None] & there
        straight = tl.load(clean + row.to(tl.int64)[:, None] * columns + column[None, :], mask=of_row, other=0.0)
        plain = tl.zeros([CLEAN, COLUMNS], WIDE)
    for step in range(STEPS):
        token = (tl.program_id(1).to(tl.int64) * STEPS + step) * TOKENS + tl.arange(0, TOKENS)
        inside = (token < tokens)[:, None]
        place = (token * columns)[:, None] + column[None, :]
        kept = keeps(seed, ((token + first_row) * columns)[:, None], column[None, :], limit, ALIGNED)
        values = tl.load(x + place, mask=inside & there, other=0.0)
        at = token[:, None] * stride_ut + rank.to(tl.int64)[None, :] * stride_ur
        back = tl.load(du + at, mask=inside & (rank < r)[None, :], other=0.0)
        seen = tl.where(kept, values, 0.0).to(values.dtype)
        total = tl.dot(tl.trans(back), seen, total, input_precision="ieee", out_dtype=WIDE)
        if ADDS:
            added = tl.dot(back, weight, input_precision="ieee", out_dtype=WIDE)
            added = tl.where(kept, added, 0.0)
        if CLEAN:
            at = token[:, None] * stride_ct + row.to(tl.int64)[None, :] * stride_cr
            back = tl.load(d_clean + at, mask=inside & (row < k)[None, :], other=0.0)
            plain = tl.dot(tl.trans(back), values, plain, input_precision="ieee", out_dtype=WIDE)
            if ADDS:
                added = tl.dot(back, straight, added, input_precision="ieee", out_dtype=WIDE)
        if ADDS:
            before = tl.load(dx + place, mask=inside & there, other=0.0).to(WIDE)
            tl.store(dx + place, before + added, mask=inside & there)
    part = tl.program_id(1).to(tl.int64)
    tl.store(found + part * stride_part + rank[:, None] * columns + column[None, :], total, mask=of_rank)
    if CLEAN:
        place = part * stride_clean + row[:, None] * columns + column[None, :]
        tl.store(found_clean + place, plain, mask=of_row)


def read(
    x: Tensor, down: Tensor, seed: Tensor, p: float, masks: int = 1, clean: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`(mask * x) down^T` for each of `masks` masks, side by side, `(tokens, masks r)`, in x's dtype if not in `dtype`;
    and from the same pass `x clean^T`, `(tokens, k)`, if a small `clean` `(k, d_in)` is given (`takes_along`).

    x is `(tokens, d_in)` and `down` `(r, d_in)`, of the same dtype; the n-th mask begins at row `n * tokens` of
    `dropout.keep_mask`. What is kept is not scaled.
    """
    (tokens, columns), r, blocks = x.shape, down.shape[0], READ[x.element_size() == 2]
    u = x.new_empty(tokens, masks, r, dtype=dtype)
    of_clean = None if clean is None else x.new_empty(tokens, clean.shape[0])
    x, grid = x.contiguous(), (masks * triton.cdiv(tokens, blocks["TOKENS"]),)
    for ranks in _few(r, x):
        part, weight = u[:, :, ranks], down[ranks].contiguous()
        beside = clean if ranks.start == 0 else None
        tensors = (seed, x, weight, weight if beside is None else beside.contiguous(), part, _or(of_clean, part))
        numbers = (masks, tokens, columns, len(weight), _rows(beside), *part.stride(), *_strides(of_clean))
        _launch(_read, grid, x, tensors, numbers, p, **_sizes(x, weight, beside), **blocks)
    return u.flatten(1), of_clean


def add_back(
    dx: Tensor | None, du: Tensor, x: Tensor, down: Tensor, seed: Tensor, p: float, masks: int = 1,
    clean: Tensor | None = None, d_clean: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Adds what comes back through `read` to dx, in place, if there is one; returns the gradients of `down` and of
    `clean`, at least float32. `du` is `(tokens, masks r)` and `d_clean` `(tokens, k)`, of x's dtype, any strides; dx
    `(tokens, d_in)` is contiguous."""
    (tokens, columns), r, blocks = x.shape, down.shape[0], BACK[x.element_size() == 2]
    d_clean = None if clean is None else d_clean
    of_columns, of_tokens = triton.cdiv(columns, blocks["COLUMNS"]), triton.cdiv(tokens, blocks["TOKENS"])
    steps = triton.next_power_of_2(max(1, of_columns * of_tokens // PROGRAMS))  # a power: few kernels are compiled
    parts, wider = triton.cdiv(of_tokens, steps), torch.promote_types(x.dtype, torch.float32)
    found = x.new_empty(masks, parts, r, columns, dtype=wider)
    of_clean = None if clean is None else x.new_empty(parts, len(clean), columns, dtype=wider)
    x, du = x.contiguous(), du.unflatten(1, (masks, r))
    how = {"ADDS": dx is not None, "STEPS": steps, **blocks}
    for n in range(masks):
        for ranks in _few(r, x):
            back, part, weight = du[:, n, ranks], found[n, :, ranks], down[ranks].contiguous()
            beside = clean if n == ranks.start == 0 else None
            wide_ones = (seed, x, weight, weight if beside is None else beside.contiguous(), back, _or(d_clean, back))
            tensors = (*wide_ones, _or(dx, x), part, _or(of_clean, part))
            strides = (
                *back.stride(),
                *_strides(d_clean),
                part.stride(0),
                0 if of_clean is None else of_clean.stride(0),
            )
            numbers = (tokens, columns, len(weight), _rows(beside), n * tokens, *strides)
            _launch(_add_back, (of_columns, parts), x, tensors, numbers, p, **_sizes(x, weight, beside), **how)
    return found.sum((0, 1)), None if of_clean is None else of_clean.sum(0)


def read_exactly(x: Tensor, down: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """`adapter.read_exactly` without x in float32: a weight is the sum of three of 16 bits, whose products with x's
    entries are exact in float32."""
    left, parts = down.detach().float(), []
    size = torch.exp2((left.abs().amax().log2().floor() + 1).clamp(-100, 127))
    left = left / size  # so that float16 holds what is left
    for _ in range(3):
        parts.append(left.to(x.dtype))
        left = left - parts[-1].float()
    seed, p = (_any_seed(x.device), 0.0) if seed is None else (seed, p)
    u, _ = read(x, torch.cat(parts), seed, p, dtype=torch.float32)
    return u.unflatten(1, (3, -1)).sum(1) * (size / (1 - p))


@functools.cache
def _any_seed(device: torch.device) -> Tensor:
    """One to draw masks from that keep everything."""
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int64, device=device)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What is missing is not touched, but a pointer must be there."""
    return other if tensor is None else tensor


def _rows(tensor: Tensor | None) -> int:
    return 0 if tensor is None else len(tensor)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()


def _few(r: int, x: Tensor) -> list[slice]:
    """Ranks in parts whose sums a program can hold."""
    most = MOST_RANKS[x.element_size() == 2]
    return [slice(first, min(first + most, r)) for first in range(0, r, most)]


def takes_along(clean: Tensor, x: Tensor) -> bool:
    """Whether `clean` is small enough for `read` and `add_back`."""
    return len(clean) <= MOST_RANKS[x.element_size() == 2]


def _sizes(x: Tensor, down: Tensor, clean: Tensor | None) -> dict[str, Any]:
    ranks, beside = (
        max(16, triton.next_power_of_2(rows)) for rows in (len(down), _rows(clean))
    )  # 16: a product's least
    return {
        "ALIGNED": x.shape[1] % 4 == 0, "WIDE": wide(x), "RANKS": ranks, "CLEAN": 0 if clean is None else beside
    }  # fmt: skip


def _launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int], p: float,
    **constants: Any,
) -> None:  # fmt: skip
    if like.numel():
        with on_device_of(like):
            kernel[grid](*tensors, *numbers, threshold(p), enable_fp_fusion=True, **constants)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A kernel starts on the current device, which need not be the tensor's.

    Raises:
        HeadwaterError: if Triton can run nothing on this tensor.
    """
    if tensor.device.type == "cpu":
        if isinstance(_keep_mask, triton.JITFunction):  # not wrapped by the interpreter
            raise HeadwaterError(
                Problem(
                    "Triton's kernels need a GPU, and this tensor is on the CPU",
                    "HEADWATER_OPS",
                    "leave HEADWATER_OPS unset, or set TRITON_INTERPRET=1 to check the kernels without one",
                )
            )
        return contextlib.nullcontext()
    return torch.cuda.device_of(tensor)


def wide(tensor: Tensor) -> Any:
    """Triton's type for sums over a tensor's values."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@torch.library.custom_op("headwater::keep_mask", mutates_args=())
def keep_mask(seed: Tensor, rows: int, columns: int, p: float, first_row: int) -> Tensor:
    """`dropout.keep_mask`."""
    kept = seed.new_empty(rows, columns, dtype=torch.bool)
    out, first = kept.view(torch.int8), first_row * columns
    grid = (triton.cdiv(out.numel(), ENTRIES),)
    _launch(_keep_mask, grid, out, (seed, out), (out.numel(), first), p, ALIGNED=first % 4 == 0, ENTRIES=ENTRIES)
    return kept


@keep_mask.register_fake
def _(seed: Tensor, rows: int, columns: int, p: float, first_row: int) -> Tensor:
    return seed.new_empty(rows, columns, dtype=torch.bool)
