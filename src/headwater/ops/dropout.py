"""Dropout whose mask is a function of a seed and of the place in the matrix, so that nothing but the seed is kept.

Entry `i` (row-major) is byte `i % 4`, the lowest first, of word `i // 4` (modulo 2^32), a 32-bit hash of its number w
and the seed. Below that byte stand 8 more bits that are not random but take their turn, so that over the seeds every
entry is dropped with probability p to 2^-16 (up to 255/256). The arithmetic is the same everywhere, so every
implementation of an operation, on every device, draws the same mask from one seed.

    h = (w * M0 + low) mod 2^32                    low, high: the seed's lower 31 bits and the 31 above them
    h = h ^ (h >> 16);  h = h * M1;  h = h ^ high
    h = h ^ (h >> 16);  h = h * M2                 all int32, two's complement, shifts arithmetic
    kept where 256 byte + ((i + turn) * TURN mod 256) >= round(p 2^16)      turn: the seed's bits 54 to 61
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .dispatch import implementation

M0, M1, M2 = -1640531527, 0x21F0AAAD, 0x735A2D97
TURN = 159  # odd, and 0.62 of 256, so that the turns of neighbours are far apart
BITS = 31
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
TABLE = 1 << 17  # words whose steps and limits a CPU looks up: as many as stay in its cache


def draw_seed(device: torch.device, count: int = 1) -> Tensor:
    """`count` seeds, int64 `(count,)` in [0, 2^62), from torch's global generator of the device: `torch.manual_seed`
    and gradient checkpointing rule them, and no accelerator has to be waited for."""
    return torch.randint(2 ** (2 * BITS), (count,), device=device)


def draw_seeds(device: torch.device, pairs: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of seeds of one element in one draw; on a CPU the same as draw by draw."""
    seeds = draw_seed(device, 2 * pairs).split_with_sizes([1] * (2 * pairs))
    return list(zip(seeds[::2], seeds[1::2], strict=True))


def threshold(p: float) -> int:
    """The value from which on an entry's 16 bits are kept."""
    return min(round(p * 2**16), 255 * 2**8)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float, *, first_row: int = 0) -> Tensor:
    """Which entries of a `(rows, columns)` matrix a dropout of probability p keeps.

    Args:
        seed: int64, one element, from `draw_seed`.
        first_row: where these rows begin in the matrix, so that it can be made block by block.

    Returns:
        bool `(rows, columns)`.
    """
    return keep_masks([seed], rows, columns, p, first_row=first_row).view(rows, columns)


def keep_masks(seeds: Sequence[Tensor], rows: int, columns: int, p: float, *, first_row: int = 0) -> Tensor:
    """`keep_mask` of several seeds at once: bool `(seeds, rows, columns)`."""
    if implementation(seeds[0].device) == "triton":
        from .triton_dropout import keep_mask as one_kernel

        return torch.stack([one_kernel(seed, rows, columns, p, first_row) for seed in seeds])
    first, size = first_row * columns, rows * columns
    word, byte = divmod(first, 4)
    low, high, turns = _parts(seeds)
    start = low + _int32(word * M0)
    h = _steps((byte + size + 3) // 4, seeds[0].device) + (_int32(start) if isinstance(start, int) else start)
    shifted = h >> 16
    h ^= shifted
    h *= M1
    h ^= high
    h ^= torch.bitwise_right_shift(h, 16, out=shifted)
    h *= M2
    # In place the comparison is vectorised, and makes ones and zeros of the same dtype.
    entries = h.view(torch.uint8)
    kept = entries.narrow(-1, byte, size) if entries.shape[-1] > size else entries
    for row, turn in zip(kept if kept.dim() == 2 else [kept], turns, strict=True):
        row.ge_(_limits(threshold(p), first, turn, size, h.device))
    return kept.view(torch.bool).view(len(seeds), rows, columns)


def _int32(value: int) -> int:
    """The number that an int32 would hold."""
    return (value + 2**31) % 2**32 - 2**31


def _steps(words: int, device: torch.device) -> Tensor:
    """w * M0 for the first words."""
    if device.type == "cpu" and words <= TABLE and not torch.compiler.is_compiling():
        return _table()[:words]
    return torch.arange(words, dtype=torch.int32, device=device) * M0


@functools.cache
def _table() -> Tensor:
    return torch.arange(TABLE, dtype=torch.int32) * M0


def _limits(threshold: int, first: int, turn: Tensor | int, size: int, device: torch.device) -> Tensor:
    """The least byte that is kept, for each entry from the first on: uint8 `(size,)`."""
    at = (turn + first) % 256
    if isinstance(at, int) and size <= 4 * TABLE:
        return _limit_table(threshold)[at : at + size]
    return _limits_of(torch.arange(size, dtype=torch.int32, device=device) + at, threshold)


def _limits_of(place: Tensor, threshold: int) -> Tensor:
    return ((threshold + 255 - (place * TURN & 255)) >> 8).to(torch.uint8)


@functools.lru_cache(16)
def _limit_table(threshold: int) -> Tensor:
    return _limits_of(torch.arange(4 * TABLE + 256, dtype=torch.int32), threshold)


def _parts(seeds: Sequence[Tensor]) -> tuple[Tensor | int, Tensor | int, Sequence[Tensor | int]]:
    """The seeds' lower and higher 31 bits, int32 `(seeds, 1)` or a number, and their turns."""
    if seeds[0].device.type == "cpu" and not torch.compiler.is_compiling():
        known = [int(seed) for seed in seeds]
        parts = [divmod(seed, 2**BITS) for seed in known]
        turns = [high >> 23 for high, _ in parts]
        if len(parts) == 1:
            return parts[0][1], parts[0][0], turns
        values = torch.tensor(parts, dtype=torch.int32)
        return values[:, 1:], values[:, :1], turns
    seed = torch.cat([seed.reshape(1, 1) for seed in seeds])
    low, high = ((seed >> shift & (2**BITS - 1)).to(torch.int32) for shift in (0, BITS))
    return low, high, list((seed >> 54).unbind())


def pack(kept: Tensor) -> Tensor:
    """A mask on a CPU as bits: uint8 `(rows, columns / 8)`. `columns` is a multiple of 8."""
    return torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little"))  # several times as fast as torch


def unpack(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of `pack` as ones and zeros `(rows, columns)` of a dtype; much cheaper than to draw it again."""
    return (
        _bits_of_bytes(dtype, bits.device).index_select(0, bits.flatten().int()).view(bits.shape[0], 8 * bits.shape[1])
    )


@functools.cache
def _bits_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Those of each byte, lowest first: `(256, 8)`."""
    places = torch.arange(8, device=device)
    return (torch.arange(256, device=device).unsqueeze(1) >> places & 1).to(dtype)


def masked(values: Tensor, kept: Tensor) -> Tensor:
    """`values` where a bool mask of their shape is true, 0 elsewhere: as whole numbers, which beats a product with ones
    and zeros in half precision and a selection in any."""
    whole = WHOLE[values.element_size()]
    return kept.view(torch.int8).neg().to(whole).bitwise_and_(values.view(whole)).view(values.dtype)


def drop(values: Tensor, seed: Tensor, p: float, *, first_row: int = 0) -> Tensor:
    """`values` `(rows, columns)` with dropped entries 0 and kept ones divided by `1 - p`."""
    kept = keep_mask(seed, values.shape[0], values.shape[1], p, first_row=first_row)
    return torch.where(kept, values, 0) * (1 / (1 - p))
