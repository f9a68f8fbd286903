"""MultiLoRA: several small LoRAs in parallel, none starting at zero, each behind a learned scale that does.

Wang et al., "MultiLoRA: Democratizing LoRA for Better Multi-Task Learning", arXiv:2311.11501.

    y = W x + s sum_k c_k * ( B_k A_k dropout(x) )            c_k starts at 0, one number per output channel

No router and no task ids: a sum of branches is one LoRA of rank N r with another start, and merges exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import Problem
from .base import Branch, Heads, LayerShape, Method, MethodConfig, kaiming, register


@dataclass
class MultiLoraConfig(MethodConfig):
    """MultiLoRA. See `MethodConfig` for the other fields.

    Args:
        num_heads: N, the number of parallel branches, each of rank r.
        scale_shape: "vector" has a scale per branch and output channel, "scalar" one per branch.
    """

    lora_dropout: float = 0.05
    num_heads: int = 3
    scale_shape: str = "vector"

    def problems(self) -> list[Problem | None]:
        return [
            *super().problems(),
            self.check("num_heads", self.num_heads >= 1, "must be at least 1"),
            self.one_of("scale_shape", ("vector", "scalar")),
        ]


class MultiLoraBranch(Branch):
    def __init__(self, config: MultiLoraConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        N, r, d_in, d_out = config.num_heads, shape.r, shape.in_features, shape.out_features
        self.A = nn.Parameter(kaiming(r, d_in, generator, batch=(N,)))
        B = kaiming(d_out, r, generator, batch=(N,))  # U(-1/sqrt(r), 1/sqrt(r)), not zero
        self.B = nn.Parameter(B.transpose(1, 2).contiguous())
        self.c = nn.Parameter(torch.zeros(N, d_out if config.scale_shape == "vector" else 1))

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A.flatten(0, 1),), ()

    def writes(self) -> Tensor:
        return (self.c.unsqueeze(1) * self.B).flatten(0, 1)

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        return self.A.flatten(0, 1), self.scaling * self.writes().T

    def heads(self) -> Heads:
        """A is all branches' stacked, `(N r, d_in)`; B has the scales in it."""
        B = self.c.unsqueeze(1) * self.B
        return Heads(self.A.flatten(0, 1), B.transpose(1, 2), None, None, None, self.scaling)


register(
    Method(
        name="multilora",
        title="MultiLoRA",
        paper="arXiv:2311.11501",
        family="parallel",
        config=MultiLoraConfig,
        branch=MultiLoraBranch,
        mergeable=True,
        heads_field="num_heads",
    )
)
