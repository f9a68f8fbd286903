"""HydraLoRA: one shared down-projection, N up-projections mixed by a per-token softmax router.

Tian et al., "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning", arXiv:2404.19245.

    g = softmax(R x)                                  per token, softmax in float32, x undropped
    y = W x + s sum_n g_n B_n A dropout(x)

The released code draws a fresh input mask for each head; most ports share one mask. Both are here (`input_dropout`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import Problem
from ..ops import GatedHeads, gated_heads, spread_heads
from .base import Branch, Heads, LayerShape, Method, MethodConfig, fixed_gate, kaiming, merge_refusal, register
from .call import Call


@dataclass
class HydraLoraConfig(MethodConfig):
    """HydraLoRA. See `MethodConfig` for the other fields.

    Args:
        num_heads: N, the number of up-projections.
        input_dropout: "shared" drops x once for all heads; "per_head" draws a mask for each head, as the released code
            does, at N times the cost of reading x.
        balance_loss_weight: weight of the multimodal variant's loss
            `sum_n mean(g_n) mean(choice_n)`, choice = one-hot argmax, means over a row's tokens, averaged over rows and
            layers; 0 is off, as in the paper.
    """

    lora_dropout: float = 0.05
    num_heads: int = 3
    input_dropout: str = "shared"
    balance_loss_weight: float = 0.0

    def problems(self) -> list[Problem | None]:
        return [
            *super().problems(),
            self.check("num_heads", self.num_heads >= 1, "must be at least 1"),
            self.check("balance_loss_weight", self.balance_loss_weight >= 0, "must not be negative"),
            self.one_of("input_dropout", ("shared", "per_head")),
        ]


def balance_loss(gate: Tensor, call: Call) -> Tensor:
    """`sum_n mean(g_n) mean(choice_n)` over a row's tokens without padding, averaged over the rows that have any.

    Behind a token dispatch activations do not show rows: there all tokens count as one row.

    Args:
        gate: `(tokens, N)`.
    """
    chosen = torch.zeros_like(gate).scatter(-1, gate.argmax(-1, keepdim=True), 1.0)
    valid, shown = call.valid_tokens(), call.shows_rows()
    counted = gate.new_ones(gate.shape[0], 1) if valid is None else valid.to(gate).unsqueeze(-1)
    tokens, of_gate, of_chosen = (
        (call.by_row(values) if shown else values.unsqueeze(0)).sum(1)
        for values in (counted, gate * counted, chosen * counted)
    )
    per_row = (of_gate * of_chosen).sum(-1) / tokens.squeeze(-1).clamp_min(1) ** 2
    return per_row.sum() / (tokens > 0).sum().clamp_min(1)


class HydraLoraBranch(Branch):
    def __init__(self, config: HydraLoraConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        N, d_in = config.num_heads, shape.in_features
        self.num_heads = N
        self.input_masks = N if config.input_dropout == "per_head" else 1
        self.balance_loss_weight = config.balance_loss_weight
        self.needs_state = self.has_losses = config.balance_loss_weight > 0
        self._layers = shape.shared.setdefault("routers", [])  # one list for all layers: how many to average over
        self._layers.append(shape.name)
        self.A = nn.Parameter(kaiming(shape.r, d_in, generator))
        self.B = nn.Parameter(torch.zeros(N, shape.r, shape.out_features))
        self.router = nn.Parameter(kaiming(N, d_in, generator))

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A,), (self.router,)

    def mix(self, z: Tensor, logits: Tensor, *, call: Call) -> Tensor:
        balancing = call.training and self.balance_loss_weight > 0
        per_head = z.shape[-1] == self.num_heads * self.A.shape[0]
        if balancing or call.observed or per_head:
            gate = torch.softmax(logits, dim=-1)
            call.saw_gate(gate)
        if balancing:
            call.add_loss("balance", balance_loss(gate, call), self.balance_loss_weight / len(self._layers))
        return spread_heads(z.unflatten(-1, (self.num_heads, -1)), gate) if per_head else gated_heads(z, logits)

    def gated_heads(self, call: Call, seed: Tensor | None) -> GatedHeads | None:
        per_head = self.input_masks > 1 and self.lora_dropout > 0
        if self.training and (per_head or self.balance_loss_weight > 0):
            return None
        show = call.saw_gate if call.observed else None
        A = self.A
        return GatedHeads(A.shape[0], self.num_heads, A.dtype, routed=True, start=False, show=show)

    def writes(self) -> Tensor:
        return self.B.flatten(0, 1)

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        if gate is None:
            if self.num_heads > 1:
                raise merge_refusal("HydraLoRA")
            gate = torch.ones(1)
        return self.A, self.scaling * torch.einsum("n,nro->or", fixed_gate(gate, self.num_heads).to(self.B), self.B)

    def heads(self) -> Heads:
        return Heads(self.A, self.B.transpose(1, 2), self.router, None, None, self.scaling)


register(
    Method(
        name="hydralora",
        title="HydraLoRA",
        paper="arXiv:2404.19245",
        family="multi-head",
        config=HydraLoraConfig,
        branch=HydraLoraBranch,
        heads_field="num_heads",
    )
)
