"""Tensor files that a method needs only while an adapter is being made: LoRI's mask, CoRA's basis, an adapter that is
continued."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..files import saying_why, write_bytes

if TYPE_CHECKING:
    from .base import LayerShape


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


def continued_tensors(config: Any, shape: LayerShape, same: Sequence[str] = ()) -> dict[str, Tensor]:
    """What the adapter folder that `config.continue_from` names holds for one layer, by the names in its branch.

    Each layer that is made asks once; after all of them `config.continued_sha256` is set.

    Args:
        same: fields that the continued adapter must have alike, besides its method and scaling.

    Raises:
        HeadwaterError: if it is no adapter of this method, a field differs, or, after the last layer, it holds what
            nobody asked for.
    """
    branch = f".{config.method_name}_branch."
    if "continued" not in shape.shared:
        held, sha = _read_adapter(config, ("peft_type", "lora_alpha", "use_rslora", "alpha_pattern", *same))

        def finish() -> None:
            if held:
                key = min(held, key=lambda key: (branch not in key, key))
                name, of_layer, _ = key.removeprefix("base_model.model.").partition(branch)
                what, fix = ("layers that this adapter has not", "use its target_modules")
                if not of_layer:
                    what, fix = "modules trained in whole", "continue an adapter that has none, nor a classifier's head"
                what = f"it has {what}, which would be lost; the first is {name}"
                raise HeadwaterError(Problem(what, "continue_from", fix))
            config.continued_sha256 = sha

        shape.shared["continued"] = held
        shape.shared.setdefault("finish", []).append(finish)
    held = shape.shared["continued"]
    prefix = f"base_model.model.{shape.name}{branch}"
    return {key.removeprefix(prefix): held.pop(key) for key in list(held) if key.startswith(prefix)}


def _read_adapter(config: Any, same: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """An adapter folder's tensors and their file's SHA-256. Factors mean the same only under the same scaling."""
    folder = Path(config.continue_from)
    file = folder / "adapter_config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        there = {name: fields.get(name) for name in same}
    except (OSError, ValueError, AttributeError) as error:
        fix = f"give the folder of a {config.method_name} adapter"
        raise HeadwaterError(Problem(f"{file} cannot be read: {error}", "continue_from", fix)) from error
    here = {name: getattr(config, name) for name in same} | {"peft_type": config.peft_type.value}
    different = [name for name in same if there[name] != here[name]]
    if different:
        different = different[:1] if "peft_type" in different else different  # another method has other fields anyway
        raise HeadwaterError(
            *(Problem(f"it has {n} {there[n]!r}, this one {here[n]!r}", "continue_from") for n in different)
        )
    return read_tensors(folder / "adapter_model.safetensors", "continue_from")


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file under a temporary name and renames it.

    Raises:
        NotWritten: if it cannot be.
    """
    file = Path(path)
    # cloned, because safetensors refuses tensors that share memory, as layers with one basis do
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with saying_why(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, save(own, metadata=dict(metadata)))  # not by `save_file`, whose files are for their owner alone


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as bytes, 8 entries each, in row-major order; the last byte is filled with zeros."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of this shape that `pack_bits` made bytes of."""
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].bool().view(shape)
