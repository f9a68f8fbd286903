"""MALoRA: a mixture of LoRA experts whose down-projections lie in one shared subspace.

Wang et al., "MALoRA: Mixture of Asymmetric Low-Rank Adaptation for Enhanced Multi-Task Learning", arXiv:2410.22782.

    p = softmax(R x);  g = its k largest, renormalised          per token, in float32, x undropped
    y = W x + s sum_n g_n B_n P_n (S dropout(x))                s = alpha / r

S, d x d_in, is read once for all experts; an expert keeps only the small P_n, r x d, of its own. Its A is P_n S, so no
expert has more than min(d, r) ranks: choose d >= r.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..ops import spread_heads
from .base import Heads, LayerShape, Method, fixed_gate, kaiming, merge_refusal, normal, register
from .call import Call
from .moe_lora import ExpertsBranch, ExpertsConfig


@dataclass
class MaLoraConfig(ExpertsConfig):
    """MALoRA; `r` is the rank of an expert's up-projection. See `ExpertsConfig` and `MethodConfig` for other fields.

    Args:
        shared_rank: d, the rank of the shared subspace; 0 means 2 r.
        init: "orthogonal" draws orthonormal rows for S and P_n from U(-1/sqrt(d), 1/sqrt(d)), so that P_n S has the
            variance of a Kaiming-uniform A; "svd" takes the best rank-d approximation of N Kaiming-uniform A's;
            "kaiming" draws both, which starts P_n S smaller by sqrt(3).
        budget_saving: rho; above 0, `r` is the rank of the MoE-LoRA that is compared with, and each layer's experts get
            the largest rank that trains at least the share rho fewer numbers, routers aside.
        scale_by: with a budget, s is alpha over the "expert_rank" so found, or over "r".
    """

    shared_rank: int = 0
    init: str = "orthogonal"
    budget_saving: float = 0.0
    scale_by: str = "expert_rank"

    def problems(self) -> list[Problem | None]:
        return [
            *super().problems(),
            self.check("shared_rank", self.shared_rank >= 0, "must not be negative"),
            self.one_of("init", ("orthogonal", "svd", "kaiming")),
            self.check("budget_saving", 0 <= self.budget_saving < 1, "must be in [0, 1)"),
            self.one_of("scale_by", ("expert_rank", "r")),
        ]

    def ranks(self, shape: LayerShape) -> tuple[int, int]:
        """d, and the rank of an expert, on one layer. Warns once an adapter if d is the lower.

        Raises:
            HeadwaterError: if the budget leaves nothing for experts.
        """
        N, d = self.experts_on(shape.name), min(self.shared_rank or 2 * shape.r, shape.in_features)
        rank = self._affordable(d, N, shape) if self.budget_saving else shape.r
        if rank > d and not self.inference_mode and shape.shared.setdefault("warned", shape.name) == shape.name:
            warnings.warn(
                f"{shape.name}: shared_rank {d} is below r {rank}: no expert can use more than {d} ranks", stacklevel=3
            )
        return d, rank

    def _affordable(self, d: int, N: int, shape: LayerShape) -> int:
        """The largest rank of experts that saves what it should."""
        d_in, d_out = shape.in_features, shape.out_features
        budget = (1 - self.budget_saving) * N * shape.r * (d_in + d_out)
        rank = math.floor((budget - d * d_in) / (N * (d + d_out)) + 1e-9)
        if rank < 1:
            raise HeadwaterError(
                Problem(
                    f"saving {self.budget_saving:.0%} on {shape.name} leaves no rank for its experts: of "
                    f"{budget:,.0f} numbers, the shared subspace takes {d * d_in:,}",
                    "budget_saving",
                    "save less, or lower shared_rank",
                )
            )
        return rank


class MaLoraBranch(ExpertsBranch):
    def __init__(self, config: MaLoraConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        N, d_in = self.num_experts, shape.in_features
        d, r = config.ranks(shape)
        self.scaling = config.scaling(r if config.scale_by == "expert_rank" else shape.r, shape.alpha)
        if config.init == "svd":
            A = kaiming(r, d_in, generator, batch=(N,))
            S = torch.linalg.svd(A.flatten(0, 1), full_matrices=False).Vh[:d]
            P = A @ S.T
            missing = d - S.shape[0]  # fewer singular vectors than d when N r < d
            if missing:
                S, P = torch.cat([S, kaiming(missing, d_in, generator)]), F.pad(P, (0, missing))
        else:
            orthogonal = config.init == "orthogonal"
            S = torch.linalg.qr(normal(1.0, d_in, d, generator=generator)).Q.T if orthogonal else None
            S = kaiming(d, d_in, generator) if S is None else S.contiguous()
            P = kaiming(r, d, generator, batch=(N,))
        self.S, self.P = nn.Parameter(S), nn.Parameter(P)
        self.B = nn.Parameter(torch.zeros(N, r, shape.out_features))
        self.router = nn.Parameter(kaiming(N, d_in, generator))
        self.chooses_by = 1 if self.top_k else None

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.S,), (self.router,)

    def mix(self, s: Tensor, logits: Tensor, *, call: Call) -> Tensor:
        z = F.linear(s, self.P.flatten(0, 1).to(s.dtype)).unflatten(-1, (self.num_experts, -1))
        return spread_heads(z, self.route(logits, call))

    def writes(self) -> Tensor:
        return self.B.flatten(0, 1)

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        if gate is None:
            if self.num_experts > 1:
                raise merge_refusal("MALoRA")
            gate = torch.ones(1)
        gate = fixed_gate(gate, self.num_experts)
        return self.S, self.scaling * torch.einsum("n,nro,nrd->od", gate.to(self.B), self.B, self.P)

    def heads(self) -> Heads:
        """A is all experts' P_n S stacked, `(N r, d_in)`."""
        A = (self.P @ self.S).flatten(0, 1)
        return Heads(A, self.B.transpose(1, 2), self.router, None, None, self.scaling)


register(
    Method(
        name="malora",
        title="MALoRA",
        paper="arXiv:2410.22782",
        family="mixture",
        config=MaLoraConfig,
        branch=MaLoraBranch,
        heads_field="num_experts",
    )
)
