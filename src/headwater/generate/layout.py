"""Adapters as vectors: which tensors there are, in which order, and how each is normalised."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import HeadwaterError, Problem
from ..files import whole_folder, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What decides what the same numbers compute.
_MEANING = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias")
_TINY = 1e-12


@dataclass(frozen=True)
class Layout:
    """The tensors of an adapter file.

    Args:
        names: in the order in which they stand in the vector, which is the alphabet's.
        shapes, dtypes: of each; dtypes by name, `float32`.
        config: the content of `adapter_config.json`.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    config: dict[str, Any]

    @property
    def sizes(self) -> list[int]:
        return [torch.Size(shape).numel() for shape in self.shapes]

    @property
    def length(self) -> int:
        """L, the numbers in all tensors together."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensors as one float32 vector `(L,)`."""
        return torch.cat([tensors[name].float().flatten() for name in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors of a vector `(L,)`, in their own shapes and dtypes."""
        parts = vector.split(self.sizes)
        return {
            name: part.view(shape).to(getattr(torch, dtype)).contiguous()
            for name, shape, dtype, part in zip(self.names, self.shapes, self.dtypes, parts, strict=True)
        }

    def spread(self, per_tensor: Tensor) -> Tensor:
        """One number per tensor `(tensors,)`, repeated over the tensor's entries: `(L,)`."""
        return per_tensor.repeat_interleave(torch.tensor(self.sizes))

    def require_same(self, other: Layout, where: str) -> None:
        """Raises HeadwaterError unless the other adapter's numbers mean the same; names the first difference."""
        mine = dict(zip(self.names, self.shapes, strict=True))
        theirs = dict(zip(other.names, other.shapes, strict=True))
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                sizes = f"{_size(theirs.get(name))} here, {_size(mine.get(name))} in the first adapter"
                raise _different(f"{name} is {sizes}", where)
        for field in _MEANING:
            here, first = other.config.get(field), self.config.get(field)
            if here != first:
                raise _different(f"{field} is {here!r} here, {first!r} in the first adapter", where)


def _size(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))


def _different(what: str, where: str) -> HeadwaterError:
    fix = "one generator writes adapters of one layout: same base model, r, alpha and target_modules"
    return HeadwaterError(Problem(f"the adapter has another layout: {what}", where, fix))


def read_adapter(folder: Path) -> tuple[Layout, Tensor]:
    """An adapter folder's layout, and its weights as one vector `(L,)`.

    Raises:
        HeadwaterError: a file is missing, unreadable or no plain LoRA's, or a weight is not finite.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise HeadwaterError(Problem(f"cannot be read as an adapter: {error}", str(folder))) from error
    if config.get("peft_type") != "LORA":
        what = f"is an adapter of {config.get('peft_type')}; the generator writes plain LoRA"
        raise HeadwaterError(Problem(what, str(folder), "collect adapters with method: {name: lora}"))
    names = tuple(sorted(tensors))
    layout = Layout(
        names,
        tuple(tuple(tensors[name].shape) for name in names),
        tuple(str(tensors[name].dtype).removeprefix("torch.") for name in names),
        config,
    )
    vector = layout.flatten(tensors)
    if not vector.isfinite().all():
        raise HeadwaterError(Problem("holds weights that are not finite", str(folder), "leave this checkpoint out"))
    return layout, vector


def write_adapter(folder: Path, layout: Layout, vector: Tensor) -> None:
    """Writes a vector `(L,)` as an ordinary PEFT LoRA folder, whole or not at all."""
    with whole_folder(folder) as work:
        write_json(work / CONFIG, layout.config)
        save_file(layout.unflatten(vector), work / WEIGHTS, metadata={"format": "pt"})


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of every tensor, `(tensors,)` each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, layout: Layout, vectors: Tensor) -> Scale:
        """Of vectors `(n, L)`, averaged over them. A constant tensor gets 1, so that nothing is divided by 0."""
        parts = vectors.split(layout.sizes, dim=1)
        mean = torch.stack([part.mean() for part in parts])
        # n - 1 as in the paper's code; a tensor of one number has no deviation, and counts as constant
        std = torch.stack([part.std(dim=1, correction=min(1, part.shape[1] - 1)).mean() for part in parts])
        return cls(mean, torch.where(std < _TINY, torch.ones_like(std), std))

    @classmethod
    def average(cls, scales: Sequence[Scale]) -> Scale:
        """The tasks' scales pooled, for a task that none was measured on."""
        return cls(torch.stack([s.mean for s in scales]).mean(0), torch.stack([s.std for s in scales]).mean(0))

    def normalise(self, layout: Layout, vectors: Tensor) -> Tensor:
        return (vectors - layout.spread(self.mean)) / layout.spread(self.std)

    def restore(self, layout: Layout, vectors: Tensor) -> Tensor:
        return vectors * layout.spread(self.std) + layout.spread(self.mean)
