"""Dropout whose mask is a function of a seed and of the place in the matrix, so that nothing but the seed is kept.

Entry `i` (row-major, modulo 2^32) is kept where a 32-bit hash of `i` and the seed falls below the keep rate. The hash
is the same arithmetic everywhere, so every implementation of an operation, on every device, draws the same mask from
one seed; backward computes it again, or remembers its bits where that is cheaper.

    h = (i * M0 + low) mod 2^32                    low, high: the seed's lower 31 bits and the 31 above them
    h = h ^ (h >> 16);  h = h * M1;  h = h ^ high
    h = h ^ (h >> 15);  h = h * M2                 all int32, two's complement, shifts arithmetic
    kept where h < round((1 - p) 2^32) - 2^31
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import implementation

M0, M1, M2 = -1640531527, 0x21F0AAAD, 0x735A2D97
BITS = 31


def draw_seed(device: torch.device, count: int = 1) -> Tensor:
    """`count` seeds, int64 `(count,)` in [0, 2^62), from torch's global generator of the device: `torch.manual_seed`
    and gradient checkpointing rule them, and no accelerator has to be waited for."""
    return torch.randint(2 ** (2 * BITS), (count,), device=device)


def threshold(p: float) -> int:
    """The hash value below which an entry is kept, in int32."""
    return min(round((1 - p) * 2**32), 2**32 - 1) - 2**31


def keep_mask(
    seed: Tensor, rows: int, columns: int, p: float, *, first_row: int = 0, by_column: bool = False
) -> Tensor:
    """Which entries of a `(rows, columns)` matrix a dropout of probability p keeps.

    Args:
        seed: int64, one element, from `draw_seed`.
        first_row: where these rows begin in the matrix, so that it can be made block by block.
        by_column: lay the result out column after column; its shape is the same.

    Returns:
        bool `(rows, columns)`.
    """
    if implementation(seed.device) == "triton":
        from .triton_dropout import keep_mask as one_kernel

        return one_kernel(seed, rows, columns, p, first_row, by_column)
    low, high = _halves(seed)
    places = _places(rows, columns, first_row, seed.device, by_column)
    kept = _hash(places, low, high) < threshold(p)
    return kept.T if by_column else kept


def keep_masks(seeds: Sequence[Tensor], rows: int, columns: int, p: float) -> Tensor:
    """`keep_mask` of several seeds at once, laid out by column: bool `(seeds, columns, rows)`."""
    if seeds[0].device.type != "cpu" or len(seeds) == 1:
        return torch.stack([keep_mask(seed, rows, columns, p, by_column=True).T for seed in seeds])
    low, high = torch.tensor([_halves(seed) for seed in seeds], dtype=torch.int32).T[:, :, None, None]
    return _hash(_places(rows, columns, 0, seeds[0].device, by_column=True) + low, 0, high) < threshold(p)


def _places(rows: int, columns: int, first_row: int, device: torch.device, by_column: bool) -> Tensor:
    """i * M0 for each entry i."""
    step = (columns * M0 + 2**31) % 2**32 - 2**31  # the product as int32
    row = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=device) * step
    column = torch.arange(columns, dtype=torch.int32, device=device) * M0
    return column.unsqueeze(1) + row if by_column else row.unsqueeze(1) + column


def _hash(h: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """The hash of places, written over them."""
    h += low
    shifted = h >> 16
    h ^= shifted
    h *= M1
    h ^= high
    h ^= torch.bitwise_right_shift(h, 15, out=shifted)
    h *= M2
    return h


def _halves(seed: Tensor) -> tuple[Tensor | int, Tensor | int]:
    """The seed's lower and higher 31 bits: plain numbers where reading them waits for nobody."""
    if seed.device.type == "cpu" and not torch.compiler.is_compiling():
        value = int(seed)
        return value & (2**BITS - 1), value >> BITS
    low, high = ((seed >> shift & (2**BITS - 1)).to(torch.int32).reshape(()) for shift in (0, BITS))
    return low, high


def pack(kept: Tensor) -> Tensor:
    """A mask as bits: uint8 `(rows, columns / 8)`. `columns` is a multiple of 8."""
    eight = kept.contiguous().view(torch.int64)  # each byte 0 or 1; the product moves them side by side to the top
    return (eight * 0x0102040810204080 >> 56).to(torch.uint8)


def unpack(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of `pack` as ones and zeros `(rows, columns)` of a dtype; much cheaper than to draw it again."""
    return _bits_of_bytes(dtype, bits.device).index_select(0, bits.flatten().int()).view(bits.shape[0], -1)


@functools.cache
def _bits_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Those of each byte, lowest first: `(256, 8)`."""
    places = torch.arange(8, device=device)
    return (torch.arange(256, device=device).unsqueeze(1) >> places & 1).to(dtype)


def drop(values: Tensor, seed: Tensor, p: float, *, first_row: int = 0) -> Tensor:
    """`values` `(rows, columns)` with dropped entries 0 and kept ones divided by `1 - p`."""
    kept = keep_mask(seed, values.shape[0], values.shape[1], p, first_row=first_row)
    return torch.where(kept, values, 0) * (1 / (1 - p))
