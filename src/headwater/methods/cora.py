"""CoRA: LoRA whose up-projection is the common subspace of several models' weights, frozen or as a start.

Xiao et al., "CoRA: Optimizing Low-Rank Adaptation with Common Subspace of Large Language Models", arXiv:2409.02119.

    y = W x + s B (A dropout(x))          A starts at 0; B = leading left singular vectors of the weights side by side

With B frozen, half the parameters train and every update stays in B's span; adapters that share B merge by averaging A.
`headwater subspace` extracts B; it is stored in the adapter, never recomputed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from .base import Branch, Heads, LayerShape, Method, MethodConfig, kaiming, register
from .files import read_tensors


@dataclass
class CoraConfig(MethodConfig):
    """CoRA. See `MethodConfig` for the other fields.

    Args:
        basis: a file made by `headwater subspace`. Needed only to make the adapter.
        variant: "frozen_b" trains A alone, "init_b" trains both.
        init_a: "zeros" starts at the base model; "kaiming" does not, as B is not zero.
        basis_sha256: checksum of the basis that was used. Set when the adapter is made.
    """

    basis: str | None = None
    variant: str = "frozen_b"
    init_a: str = "zeros"
    basis_sha256: str | None = None

    files = ("basis",)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: without the file's path once B is in the adapter."""
        return {**super().to_dict(), **({} if self.basis_sha256 is None else {"basis": None})}

    def problems(self) -> list[Problem | None]:
        return [
            *super().problems(),
            self.one_of("variant", ("frozen_b", "init_b")),
            self.one_of("init_a", ("zeros", "kaiming")),
            Problem(
                "CoRA needs the common subspace of one or several models",
                "basis",
                "make one: headwater subspace --model MODEL --output basis.safetensors",
            )
            if self.basis is None and self.basis_sha256 is None
            else None,
        ]


class CoraBranch(Branch):
    B: Tensor

    def __init__(self, config: CoraConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        r, d_in = shape.r, shape.in_features
        self.A = nn.Parameter(torch.zeros(r, d_in) if config.init_a == "zeros" else kaiming(r, d_in, generator))
        # Where a saved adapter is being loaded there is no basis; without its file nothing must look as if it worked.
        B = torch.full((r, shape.out_features), math.nan) if config.basis is None else self._basis(config, shape)
        if config.variant == "frozen_b":
            self.register_buffer("B", B)
        else:
            self.B = nn.Parameter(B)

    def _basis(self, config: CoraConfig, shape: LayerShape) -> Tensor:
        shared = shape.shared
        if "cora_basis" not in shared:
            shared["cora_basis"], sha = read_tensors(config.basis or "", "basis")

            def finish() -> None:
                config.basis_sha256 = sha

            shared.setdefault("finish", []).append(finish)
        basis = shared["cora_basis"].get(shape.name)
        if basis is None or basis.shape[0] != shape.out_features or basis.shape[1] < shape.r:
            found = "the file has none for it" if basis is None else f"the file has {tuple(basis.shape)}"
            raise HeadwaterError(
                Problem(
                    f"layer {shape.name} needs a basis of {shape.out_features} rows and at least {shape.r} columns; "
                    f"{found}",
                    "basis",
                    "extract it from models of the same architecture, for these target_modules and at least this r",
                )
            )
        return basis[:, : shape.r].T.float().contiguous()

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A,), ()

    def writes(self) -> Tensor:
        return self.B

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        return self.A, self.scaling * self.B.T

    def heads(self) -> Heads:
        return Heads(self.A, self.B.T.unsqueeze(0), None, None, None, self.scaling)


register(
    Method(
        name="cora",
        title="CoRA",
        paper="arXiv:2409.02119",
        family="subspace",
        config=CoraConfig,
        branch=CoraBranch,
        mergeable=True,
    )
)
