"""R-LoRA: multi-head random initialisation and multi-head dropout on HydraLoRA's skeleton.

Liu et al., "R-LoRA: Randomized Multi-Head LoRA for Efficient Multi-Task Learning", arXiv:2502.15455.

    u   = A x                                 one shared down-projection
    g   = softmax(R x)                        a gate over N heads, per token, softmax in float32
    h_n = D_n * u                             an own dropout mask per head, token and rank
    y   = W x + s sum_n g_n B_n h_n - s mean_n(B_n at start) (A at start) x

The heads start from different Gaussians, so the model would start somewhere else; the last term takes that start out.
It is kept as two frozen buffers in the adapter, so the base weights are never touched and the file is complete.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..ops import GatedHeads, gated_heads
from .base import Branch, Heads, LayerShape, Method, MethodConfig, fixed_gate, kaiming, merge_refusal, normal, register
from .call import Call

LOUD = 0.5  # starting noise that is worth a warning


@dataclass
class MultiHeadConfig(MethodConfig):
    """What R-LoRA and M-LoRA share.

    Args:
        num_heads: N, the number of up-projections.
        head_dropout: dropout on the rank-r vector A x, with an own mask for each head.
        init: how A and the heads start. "paper": Table 1, A ~ N(0, 1/d_in) and B_n ~ N(0, 1/d_out), each times
            d_out^(1/4) / sqrt(gamma). "official_intended": the released script's r^(1/4) in place of d_out^(1/4).
            "official_as_run": with that script's scaling applied once per head, for reproduction only.
            "zeros": A Kaiming-uniform and B_n zero, as HydraLoRA.
        gamma: the divisor of "paper" and "official_*" above.
        compensation: "buffer" keeps the starting A and mean head as frozen buffers and subtracts their product;
            "center" takes the mean out of the heads themselves and needs no buffer.
        init_norm_clip: shrink A and B_n so that the starting offset has no entry larger than W's largest.
    """

    use_rslora: bool = True
    num_heads: int = 3
    head_dropout: float = 0.1
    init: str = "paper"
    gamma: float = 64.0
    compensation: str = "buffer"
    init_norm_clip: bool = False

    def problems(self) -> list[Problem | None]:
        return [
            *super().problems(),
            self.check("num_heads", self.num_heads >= 1, "must be at least 1"),
            self.check("head_dropout", 0 <= self.head_dropout < 1, "must be in [0, 1)"),
            self.check("gamma", self.gamma > 0, "must be positive"),
            self.one_of("init", ("paper", "official_intended", "official_as_run", "zeros")),
            self.one_of("compensation", ("buffer", "center")),
        ]


@dataclass
class RLoraConfig(MultiHeadConfig):
    """R-LoRA. See `MultiHeadConfig` and `MethodConfig` for the other fields.

    Args:
        router_init: "zeros" starts with equal gates, so that the model begins exactly unchanged; "kaiming" is the
            released script's, with which it does not at paper scale.

    Raises:
        HeadwaterError: `init="zeros"` with `router_init="zeros"`: equal heads behind equal gates would stay equal.
    """

    router_init: str = "zeros"

    def problems(self) -> list[Problem | None]:
        return [
            *super().problems(),
            self.one_of("router_init", ("zeros", "kaiming")),
            Problem(
                "zero heads behind a zero router all receive the same gradient and stay equal",
                "router_init",
                "with init='zeros' set router_init='kaiming'",
            )
            if self.init == "zeros" and self.router_init == "zeros" and self.num_heads > 1
            else None,
        ]


def draw_heads(
    config: MultiHeadConfig, shape: LayerShape, generator: torch.Generator, scaling: float
) -> tuple[Tensor, Tensor]:
    """The starting A `(r, d_in)` and B `(N, r, d_out)`; spec and symbols as in `MultiHeadConfig.init`."""
    r, N, d_in, d_out = shape.r, config.num_heads, shape.in_features, shape.out_features
    if config.init == "zeros":
        return kaiming(r, d_in, generator), torch.zeros(N, r, d_out)
    paper = config.init == "paper"
    factor = (d_out if paper else r) ** 0.25 / config.gamma**0.5
    A = normal((d_in if paper else max(r, d_in)) ** -0.5, r, d_in, generator=generator)
    B = normal((d_out if paper else max(r, d_out)) ** -0.5, N, r, d_out, generator=generator)
    if config.init == "official_as_run":  # the script's loop rescales A, and every head, once per remaining head
        A *= factor**N
        B *= torch.tensor([factor ** (N - k) for k in range(N)]).view(N, 1, 1)
    else:
        A *= factor
        B *= factor
    if config.init_norm_clip and not config.inference_mode:  # else what was saved takes the start's place
        if shape.weight is None or not shape.weight.any():  # clipped to a zero weight, the adapter could never learn
            fix = "leave it off; an adapter that has it is loaded here with is_trainable=False"
            raise HeadwaterError(
                Problem("init_norm_clip needs the values of a base weight that is not zero", shape.name, fix)
            )
        offset = scaling * (A.T @ B.mean(0))
        clip = min(1.0, (shape.weight.abs().max() / offset.abs().max()).item()) ** 0.5
        A *= clip
        B *= clip
    return A, B


def starting_noise(weight: Tensor | None, A: Tensor, B: Tensor, p: float, scaling: float) -> float:
    """Size of the first steps' dropout noise relative to W x, for white x: heads start large, dropout acts on them.

    `s std(A) std(B) sqrt(r) / std(W) * sqrt(p / (1 - p)) / sqrt(N)`; for `init="paper"` with rsLoRA the first factor is
    alpha / (gamma sqrt(d_in)). A `(r, d_in)`, B `(N, r, d_out)`. 0 when W is not at hand, or is zero.
    """
    if weight is None or p == 0 or not weight.any():
        return 0.0
    N, r, _ = B.shape
    size_W, size_A, size_B = (
        torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).item() / t.numel() ** 0.5
        for t in (weight, A, B)
    )
    return scaling * size_A * size_B * r**0.5 / size_W * (p / (1 - p) / N) ** 0.5


def _warn_once_of_all(noise: float, shape: LayerShape) -> None:
    """One warning for the adapter, when all its layers are there: its worst layer, and how many are as loud."""
    if "starting_noise" not in shape.shared:
        noisy: list[tuple[float, str]] = shape.shared.setdefault("starting_noise", [])

        def finish() -> None:
            worst, name = max(noisy)
            others = f"; {len(noisy)} layers are above {LOUD:.0%}" if len(noisy) > 1 else ""
            warnings.warn(
                f"{name}: head dropout on heads of this starting size adds noise of {worst:.0%} of the layer's "
                f"output at step 0{others}; lower lora_alpha or head_dropout, or raise gamma",
                stacklevel=2,
            )

        shape.shared.setdefault("finish", []).append(finish)
    shape.shared["starting_noise"].append((noise, shape.name))


class MultiHeadBranch(Branch):
    """A shared, N heads, their start and its compensation; a subclass brings the gate."""

    total_weight: float = 1.0  # of all heads together; 1 for gates and for a mean

    A: Tensor
    B: Tensor
    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, config: MultiHeadConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        self.head_dropout = config.head_dropout
        self.num_heads = config.num_heads
        scaling = self.scaling * self.total_weight  # of the heads' mean
        A, B = draw_heads(config, shape, generator, scaling)
        has_start = config.init != "zeros"
        if has_start and config.compensation == "center":
            B = B - B.mean(0)
        noise = 0.0 if config.inference_mode else starting_noise(shape.weight, A, B, config.head_dropout, scaling)
        if noise > LOUD:
            _warn_once_of_all(noise, shape)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)  # B as (N, r, d_out): stacking heads is then a view
        buffered = has_start and config.compensation == "buffer"
        self.register_buffer("A0", A.clone() if buffered else None)
        self.register_buffer("B0", self.start_of(B) if buffered else None)

    def start_of(self, B: Tensor) -> Tensor:
        """What the heads add up to at the start, `(r, d_out)`."""
        return self.total_weight * B.mean(0)

    def gated(self, z: Tensor, gate: Tensor, start: tuple[Tensor, ...], call: Call) -> Tensor:
        """`gate`: a router's logits `(tokens, N)`, or fixed gates `(N,)`."""
        h = gated_heads(z, gate, seed=call.seed, dropout=self.head_dropout)
        return torch.cat([h, -start[0]], dim=-1) if start else h

    def in_closed_form(self, seed: Tensor | None, **gates: Any) -> GatedHeads:
        """What `gated` does; `gates` are the arguments of `GatedHeads` about them."""
        A, start, p = self.A, self.A0 is not None, self.head_dropout
        return GatedHeads(
            A.shape[0], self.num_heads, A.dtype, start=start, dropout=p, seed=seed if p > 0 else None, **gates
        )

    def writes(self) -> Tensor:
        return torch.cat(self.writes_apart())

    def writes_apart(self) -> tuple[Tensor, ...]:
        stacked, B0 = self.B.flatten(0, 1), self.B0
        return (stacked,) if B0 is None else (stacked, B0)

    def held(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of `s sum_n gate_n B_n A - s B0 A0` for a gate `(N,)`; the heads share A, so R is r or 2 r."""
        A, B = self.A, torch.einsum("n,nro->or", gate.to(self.B), self.B)
        if self.A0 is not None and self.B0 is not None:
            A, B = torch.cat([A, self.A0]), torch.cat([B, -self.B0.T], dim=1)
        return A, self.scaling * B

    def heads(self) -> Heads:
        return Heads(
            A=self.A,
            B=self.B.transpose(1, 2),
            router=getattr(self, "router", None),
            A0=self.A0,
            B0=None if self.B0 is None else self.B0.T,
            scaling=self.scaling,
        )


class RLoraBranch(MultiHeadBranch):
    def __init__(self, config: RLoraConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        zeros = config.router_init == "zeros"
        N, d_in = config.num_heads, shape.in_features
        self.router = nn.Parameter(torch.zeros(N, d_in) if zeros else kaiming(N, d_in, generator))

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        A0 = self.A0
        return (self.A,), (self.router,) if A0 is None else (self.router, A0)

    def mix(self, z: Tensor, logits: Tensor, *start: Tensor, call: Call) -> Tensor:
        if call.observed:
            call.saw_gate(torch.softmax(logits, dim=-1))
        return self.gated(z, logits, start, call)

    def gated_heads(self, call: Call, seed: Tensor | None) -> GatedHeads:
        return self.in_closed_form(seed, routed=True, show=call.saw_gate if call.observed else None)

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        if gate is None:
            if self.num_heads > 1:
                raise merge_refusal("R-LoRA")
            gate = torch.ones(1)
        return self.held(fixed_gate(gate, self.num_heads))


register(
    Method(
        name="rlora",
        title="R-LoRA",
        paper="arXiv:2502.15455",
        family="multi-head",
        config=RLoraConfig,
        branch=RLoraBranch,
        heads_field="num_heads",
    )
)
