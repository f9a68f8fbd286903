"""Dropout whose mask is a function of a seed and of the place in the matrix, so that nothing but the seed is kept.

Entry `i` (row-major) is half `i % 2` of word `i // 2` (modulo 2^32), a 32-bit hash of its number w and the seed. It is
kept where that half, the lower one first, falls below the keep rate, which is so a multiple of 2^-16. The arithmetic
is the same everywhere, so every implementation of an operation, on every device, draws the same mask from one seed.

    h = (w * M0 + low) mod 2^32                    low, high: the seed's lower 31 bits and the 31 above them
    h = h ^ (h >> 16);  h = h * M1;  h = h ^ high
    h = h ^ (h >> 15);  h = h * M2                 all int32, two's complement, shifts arithmetic
    kept where its half, an int16, < round((1 - p) 2^16) - 2^15
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import implementation

M0, M1, M2 = -1640531527, 0x21F0AAAD, 0x735A2D97
BITS = 31
TABLE = 1 << 17  # words whose steps a CPU looks up: as many as stay in its cache


def draw_seed(device: torch.device, count: int = 1) -> Tensor:
    """`count` seeds, int64 `(count,)` in [0, 2^62), from torch's global generator of the device: `torch.manual_seed`
    and gradient checkpointing rule them, and no accelerator has to be waited for."""
    return torch.randint(2 ** (2 * BITS), (count,), device=device)


def threshold(p: float) -> int:
    """The value below which an entry's half of a word is kept, in int16."""
    return min(round((1 - p) * 2**16), 2**16 - 1) - 2**15


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, *, first_row: int = 0) -> Tensor:
    """Which entries of a `(rows, columns)` matrix a dropout of probability p keeps.

    Args:
        seed: int64, one element, from `draw_seed`.
        first_row: where these rows begin in the matrix, so that it can be made block by block.

    Returns:
        bool `(rows, columns)`.
    """
    return keep_masks([seed], rows, columns, p, first_row=first_row)[0]


def keep_masks(seeds: Sequence[Tensor], rows: int, columns: int, p: float, *, first_row: int = 0) -> Tensor:
    """`keep_mask` of several seeds at once: bool `(seeds, rows, columns)`."""
    if implementation(seeds[0].device) == "triton":
        from .triton_dropout import keep_mask as one_kernel

        return torch.stack([one_kernel(seed, rows, columns, p, first_row) for seed in seeds])
    word, half = divmod(first_row * columns, 2)
    size = rows * columns
    low, high = _halves(seeds)
    start = low + ((word * M0 + 2**31) % 2**32 - 2**31)  # the product as int32
    h = _steps((half + size + 1) // 2, seeds[0].device) + start
    shifted = h >> 16
    h ^= shifted
    h *= M1
    h ^= high
    h ^= torch.bitwise_right_shift(h, 15, out=shifted)
    h *= M2
    # In place the comparison is vectorised, and makes ones and zeros of the same dtype.
    kept = h.view(torch.int16)[:, half : half + size].lt_(threshold(p))
    return kept.to(torch.bool).view(len(seeds), rows, columns)


def _steps(words: int, device: torch.device) -> Tensor:
    """w * M0 for the first words."""
    if device.type == "cpu" and words <= TABLE and not torch.compiler.is_compiling():
        return _table()[:words]
    return torch.arange(words, dtype=torch.int32, device=device) * M0


@functools.cache
def _table() -> Tensor:
    return torch.arange(TABLE, dtype=torch.int32) * M0


def _halves(seeds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The seeds' lower and higher 31 bits, int32 `(seeds, 1)`."""
    if seeds[0].device.type == "cpu" and not torch.compiler.is_compiling():
        values = torch.tensor([divmod(int(seed), 2**BITS) for seed in seeds], dtype=torch.int32)
        return values[:, 1:], values[:, :1]
    seed = torch.cat([seed.reshape(1, 1) for seed in seeds])
    low, high = ((seed >> shift & (2**BITS - 1)).to(torch.int32) for shift in (0, BITS))
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
