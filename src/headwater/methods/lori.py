"""LoRI: a frozen random down-projection per task and an up-projection that is trained, or only its largest tenth is.

Zhang et al., "LoRI: Reducing Cross-Task Interference in Multi-Task Low-Rank Adaptation", arXiv:2504.07448.

    y = W x + s B (A x)           A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), never trained; B starts at 0

LoRI-D trains all of B. LoRI-S keeps the entries of B that LoRI-D made largest, over all layers together, starts again
from 0 and trains only those. They are stored, trained and counted as what they are: a list of values with their places,
so no optimiser, weight decay or momentum can move an entry outside the mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..ops import widened
from .base import Branch, Heads, LayerShape, Method, MethodConfig, kaiming, register
from .files import continued_tensors, pack_bits, read_tensors, unpack_bits


@dataclass
class LoriConfig(MethodConfig):
    """LoRI. Without `mask` it is LoRI-D, with it LoRI-S. See `MethodConfig` for the other fields.

    Args:
        mask: a file that `headwater calibrate` made from a trained LoRI-D adapter. Needed only to make the adapter; the
            adapter's own file then holds all.
        reuse_a: take A from the mask's adapter, for which the mask was found; False draws a new one, as the released
            scripts do.
        continue_from: the adapter folder of another task, to learn this task on top of it: its A and B stay, and with a
            mask only entries inside that change.
        kept, kept_before: number of trained and of earlier entries of each layer. Set when the adapter is made.
        mask_sha256, continued_sha256: checksums of the files that were used. Set when the adapter is made.
    """

    r: int = 32
    lora_alpha: float = 64
    mask: str | None = None
    reuse_a: bool = True
    continue_from: str | None = None
    kept: dict[str, int] = field(default_factory=dict)
    kept_before: dict[str, int] = field(default_factory=dict)
    mask_sha256: str | None = None
    continued_sha256: str | None = None

    files = ("mask", "continue_from")

    def to_dict(self) -> dict[str, Any]:
        """What is saved: without the paths of files once what they hold is in the adapter."""
        used = {"mask": self.mask_sha256, "continue_from": self.continued_sha256}
        return {**super().to_dict(), **{name: None for name, sha in used.items() if sha is not None}}


class LoriBranch(Branch):
    A: Tensor
    index: Tensor
    index_before: Tensor
    values_before: Tensor

    def __init__(self, config: LoriConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        self.shape = (shape.r, shape.out_features)
        A, before = kaiming(shape.r, shape.in_features, generator), torch.zeros(self.shape)
        if config.continue_from is not None:
            A, before = self._continued(config, shape)
        if config.mask is None and config.mask_sha256 is None:
            self.register_buffer("A", A)
            self.B = nn.Parameter(before)
            return
        if config.mask is None:  # a saved adapter is being loaded: only sizes are known here, and needed
            if shape.name not in config.kept:
                raise HeadwaterError(Problem(f"this adapter was not made for layer {shape.name}", "target_modules"))
            kept, kept_before = config.kept[shape.name], config.kept_before.get(shape.name, 0)
            index, index_before = (torch.zeros(n, dtype=torch.int32) for n in (kept, kept_before))
            values = torch.full((kept,), math.nan)  # without its file nothing must look as if it worked
        else:
            index, stored = self._masked(config, shape)
            if config.reuse_a and config.continue_from is None and stored is not None:
                A = stored
            values = before.flatten()[index.long()]
            index_before = before.flatten().nonzero().squeeze(1).int()
            config.kept[shape.name] = index.numel()
            if index_before.numel():
                config.kept_before[shape.name] = index_before.numel()
        self.register_buffer("A", A)
        self.register_buffer("index", index)
        self.values = nn.Parameter(values)
        held = before.flatten()[index_before.long()]
        self.register_buffer("index_before", index_before if index_before.numel() else None)
        self.register_buffer("values_before", held if index_before.numel() else None)

    def _masked(self, config: LoriConfig, shape: LayerShape) -> tuple[Tensor, Tensor | None]:
        """The places of the trained entries, and the A that the mask was found with."""
        shared = shape.shared
        if "lori_mask" not in shared:
            shared["lori_mask"], sha = read_tensors(config.mask or "", "mask")

            def finish() -> None:
                unused = sorted(key for key in shared["lori_mask"] if key.endswith(".mask"))
                if unused:
                    raise HeadwaterError(
                        Problem(
                            f"the mask has layers that this adapter has not, the first is {unused[0][:-5]}",
                            "mask",
                            "use the target_modules that the mask was calibrated with",
                        )
                    )
                config.mask_sha256 = sha

            shared.setdefault("finish", []).append(finish)
        packed, layout, A = (shared["lori_mask"].pop(f"{shape.name}.{part}", None) for part in ("mask", "shape", "A"))
        inputs = shape.in_features if A is None else A.shape[1]
        needed, found = (*self.shape, shape.in_features), () if layout is None else (*layout.tolist(), inputs)
        if packed is None or found != needed:
            raise HeadwaterError(
                Problem(
                    f"the mask is of another layout: layer {shape.name} needs (r, outputs, inputs) = {needed}, the "
                    f"file has {found or 'no such layer'}",
                    "mask",
                    "calibrate it on an adapter of the same base model, r and target_modules",
                )
            )
        index = unpack_bits(packed, self.shape).flatten().nonzero().squeeze(1).int()
        return index, None if A is None else widened(A)

    def _continued(self, config: LoriConfig, shape: LayerShape) -> tuple[Tensor, Tensor]:
        """A and B of the adapter that is learned on top of."""
        found = continued_tensors(config, shape)
        A, B = found.get("A"), found.get("B")
        if B is None and "values" in found:
            B = torch.zeros(self.shape, dtype=widened(found["values"]).dtype).flatten()
            for part in ("_before", ""):
                if f"index{part}" in found:
                    B[found[f"index{part}"].long()] = found[f"values{part}"].to(B.dtype)
            B = B.view(self.shape)
        if A is None or B is None or A.shape != (shape.r, shape.in_features) or B.shape != self.shape:
            raise HeadwaterError(
                Problem(
                    f"no LoRI adapter of this layout: layer {shape.name} is missing there or has another shape",
                    "continue_from",
                    "continue an adapter of the same base model, r and target_modules",
                )
            )
        return widened(A), widened(B)

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A,), ()

    def writes(self) -> Tensor:
        if hasattr(self, "B"):
            return self.B
        B = self.values.new_zeros(self.shape).flatten()
        if self.index_before is not None:
            B = B.scatter(0, self.index_before.long(), self.values_before.to(B.dtype))
        return B.scatter(0, self.index.long(), self.values).view(self.shape)

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        return self.A, self.scaling * self.writes().T

    def heads(self) -> Heads:
        return Heads(self.A, self.writes().T.unsqueeze(0), None, None, None, self.scaling)


def calibrate(branches: Mapping[str, Branch], sparsity: float = 0.9) -> dict[str, Tensor]:
    """The mask of LoRI-S from a trained LoRI-D adapter: the largest |B|, one threshold for all layers.

    Args:
        branches: layer name -> its trained LoRI-D branch.
        sparsity: share of entries that are left out, in (0, 1).

    Returns:
        What a mask file holds: per layer `<name>.mask` (packed bits), `<name>.shape` (r, d_out) and `<name>.A`.

    Raises:
        HeadwaterError: if the adapter is not a LoRI-D one, or was not trained.
    """
    if not 0 < sparsity < 1:
        raise HeadwaterError(Problem(f"sparsity must be between 0 and 1, not {sparsity}", "sparsity"))
    if not branches or not all(isinstance(b, LoriBranch) and hasattr(b, "B") for b in branches.values()):
        raise HeadwaterError("a mask is calibrated on a LoRI-D adapter (method lori without a mask)")
    sizes = torch.cat([branch.writes().detach().abs().flatten().cpu() for branch in branches.values()])
    if not bool(sizes.any()):
        raise HeadwaterError("this LoRI-D adapter's B is all zero: train it before calibrating a mask on it")
    kept = torch.zeros(sizes.numel(), dtype=torch.bool)
    kept[sizes.topk(max(1, round((1 - sparsity) * sizes.numel()))).indices] = True
    tensors: dict[str, Tensor] = {}
    parts = kept.split([b.writes().numel() for b in branches.values()])
    for (name, branch), part in zip(branches.items(), parts, strict=True):
        shape = tuple(branch.writes().shape)
        tensors[f"{name}.mask"] = pack_bits(part)
        tensors[f"{name}.shape"] = torch.tensor(shape)
        tensors[f"{name}.A"] = branch.reads()[0][0].detach().cpu().clone()
    return tensors


register(
    Method(
        name="lori",
        title="LoRI",
        paper="arXiv:2504.07448",
        family="sparse",
        config=LoriConfig,
        branch=LoriBranch,
        mergeable=True,
    )
)
