"""Dropout whose mask is a function of a seed and of the place in the matrix, so that nothing but the seed is kept.

Entry `i` (row-major, modulo 2^32) is kept where a 32-bit hash of `i` and the seed falls below the keep rate. The hash
is the same arithmetic everywhere, so every implementation of an operation, on every device, draws the same mask from
one seed; backward computes it again instead of remembering it.

    h = (i * M0 + low) mod 2^32                    low, high: the seed's lower 31 bits and the 31 above them
    h = h ^ (h >> 16);  h = h * M1;  h = h ^ high
    h = h ^ (h >> 15);  h = h * M2                 all int32, two's complement, shifts arithmetic
    kept where h < round((1 - p) 2^32) - 2^31
"""

from __future__ import annotations

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
    step = (columns * M0 + 2**31) % 2**32 - 2**31  # the product as int32
    row = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=seed.device) * step + low
    column = torch.arange(columns, dtype=torch.int32, device=seed.device) * M0
    h = column.unsqueeze(1) + row if by_column else row.unsqueeze(1) + column
    h ^= h >> 16
    h *= M1
    h ^= high
    h ^= h >> 15
    h *= M2
    kept = h < threshold(p)
    return kept.T if by_column else kept


def _halves(seed: Tensor) -> tuple[Tensor | int, Tensor | int]:
    """The seed's lower and higher 31 bits: plain numbers where reading them waits for nobody."""
    if seed.device.type == "cpu" and not torch.compiler.is_compiling():
        value = int(seed)
        return value & (2**BITS - 1), value >> BITS
    low, high = ((seed >> shift & (2**BITS - 1)).to(torch.int32).reshape(()) for shift in (0, BITS))
    return low, high


def drop(values: Tensor, seed: Tensor, p: float, *, first_row: int = 0) -> Tensor:
    """`values` `(rows, columns)` with dropped entries 0 and kept ones divided by `1 - p`."""
    kept = keep_mask(seed, values.shape[0], values.shape[1], p, first_row=first_row)
    return torch.where(kept, values, 0) * (1 / (1 - p))
