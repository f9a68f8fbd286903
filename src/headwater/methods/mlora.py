"""M-LoRA: R-LoRA without its router; the heads are simply combined, so it merges exactly.

Liu et al., "Align, Don't Divide: Revisiting the LoRA Architecture in Multi-Task Learning", arXiv:2508.05078.

    u   = A x
    h_n = D_n * u                             an own dropout mask per head: without it all heads get equal gradients
    y   = W x + s agg_n(B_n h_n) - s agg_n(B_n at start) (A at start) x

The paper says "summation" in one place and "averaging" in another; a sum with alpha is a mean with N alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Problem
from ..ops import GatedHeads
from .base import LayerShape, Method, register
from .call import Call
from .rlora import MultiHeadBranch, MultiHeadConfig


@dataclass
class MLoraConfig(MultiHeadConfig):
    """M-LoRA. See `MultiHeadConfig` and `MethodConfig` for the other fields.

    Args:
        head_agg: "mean" keeps the scale of R-LoRA with equal gates; "sum" is the paper's other reading.
    """

    head_agg: str = "mean"

    def problems(self) -> list[Problem | None]:
        return [*super().problems(), self.one_of("head_agg", ("mean", "sum"))]


class MLoraBranch(MultiHeadBranch):
    def __init__(self, config: MLoraConfig, shape: LayerShape, generator: torch.Generator):
        self.total_weight = float(config.num_heads) if config.head_agg == "sum" else 1.0
        super().__init__(config, shape, generator)

    def gate(self) -> Tensor:
        return self.A.new_full((self.num_heads,), self.total_weight / self.num_heads)

    def gated_heads(self, call: Call, seed: Tensor | None) -> GatedHeads:
        return self.in_closed_form(seed, routed=False, gate=self.total_weight / self.num_heads)

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A,), () if self.A0 is None else (self.A0,)

    def mix(self, z: Tensor, *start: Tensor, call: Call) -> Tensor:
        return self.gated(z, self.gate(), start, call)

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        return self.held(self.gate())  # no gate depends on the input, so there is none to hold fixed


register(
    Method(
        name="mlora",
        title="M-LoRA",
        paper="arXiv:2508.05078",
        family="multi-head",
        config=MLoraConfig,
        branch=MLoraBranch,
        mergeable=True,
        heads_field="num_heads",
    )
)
