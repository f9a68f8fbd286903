"""Tensor files that a method needs only while an adapter is being made: LoRI's mask, CoRA's basis."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..files import saying_why


def read_tensors(path: str | os.PathLike[str], field: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file and the file's SHA-256.

    Args:
        field: the config field that names the file, for the error.

    Raises:
        HeadwaterError: if the file is missing or not a safetensors file.
    """
    file = Path(path)
    if not file.is_file():
        raise HeadwaterError(Problem(f"no such file: {file}", field, "check the path"))
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise HeadwaterError(Problem(f"{file} is not a readable safetensors file: {error}", field)) from error
    return tensors, hashlib.sha256(file.read_bytes()).hexdigest()


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it.

    Raises:
        NotWritten: if it cannot be.
    """
    file = Path(path)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    # cloned, because safetensors refuses tensors that share memory, as layers with one basis do
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with saying_why(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            # safetensors puts a file in its place that is for its owner alone
            save_file(own, temporary, metadata=dict(metadata))
            temporary.chmod(mode)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as bytes, 8 entries each, in row-major order; the last byte is filled with zeros."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of this shape that `pack_bits` made bytes of."""
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].bool().view(shape)
