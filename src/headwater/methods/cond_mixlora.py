"""Conditional MixLoRA: each row of the batch composes its own A and B from pools of rank-1 factors.

Shen et al., "Multimodal Instruction Tuning with Conditional Mixture of LoRA", arXiv:2402.15896. Not TUDB-Labs' MixLoRA.

    l_A = R_A mean(x)                         mean over the row's prompt
    I_A = the r largest of l_A, best first                                        independent factor selection
    p_B = softmax(R_B mean(x)) + sum_j softmax(C_j a_{I_A[j]})                    conditional on the a's just chosen
    I_B = the r largest of p_B, best first
    y   = W x + s sum_j b_{I_B[j]} a_{I_A[j]}^T dropout(x)                        factors enter with weight 1

The released routers never train: only indices of a top-k are used, which have no gradient. Here each chosen factor is
multiplied by p / stop_gradient(p), which is 1 in the forward and lets the router learn.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from .base import Branch, Heads, LayerShape, Method, MethodConfig, NotMergeable, kaiming, register
from .call import Call


@dataclass
class CondMixLoraConfig(MethodConfig):
    """Conditional MixLoRA; `r` factors are chosen. See `MethodConfig` for the other fields.

    Args:
        num_factors: E, the factors in each pool.
        router: "ifs+cfs" as above, "ifs" chooses B's factors from x alone, "tied" gives B the indices of A.
        cfs_fusion: "paper" adds the probabilities; "release" puts the conditional ones through a second softmax.
        cfs_sum_bug: compute (sum a)(sum C) in place of C a, as the released einsum does; for reproduction only.
        router_grad: "straight_through" as above; "scored" multiplies each factor by its probability; "none" trains no
            router, as released.
        pool: "prompt" routes by the prompt alone, so that answers do not leak into training and generation agrees with
            it; "all_tokens" by all tokens but padding, as released.
    """

    r: int = 4
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    num_factors: int = 16
    router: str = "ifs+cfs"
    cfs_fusion: str = "paper"
    cfs_sum_bug: bool = False
    router_grad: str = "straight_through"
    pool: str = "prompt"

    def problems(self) -> list[Problem | None]:
        ranks = (self.r, *self.rank_pattern.values())
        return [
            *super().problems(),
            self.check("num_factors", self.num_factors >= max(ranks), f"must be at least the rank, {max(ranks)}"),
            self.one_of("router", ("ifs+cfs", "ifs", "tied")),
            self.one_of("cfs_fusion", ("paper", "release")),
            self.one_of("router_grad", ("straight_through", "scored", "none")),
            self.one_of("pool", ("prompt", "all_tokens")),
        ]


class CondMixLoraBranch(Branch):
    needs_state = by_prompt = True

    router_A: Tensor  # noqa: N815, the equation's names, as in all methods
    router_B: Tensor  # noqa: N815
    router_AB: Tensor  # noqa: N815

    def __init__(self, config: CondMixLoraConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        E, r, d_in = config.num_factors, shape.r, shape.in_features
        self.r, self.config = r, copy.copy(config)  # its own: `mix` remembers by it, and adapters may share one
        self.A = nn.Parameter(kaiming(E, d_in, generator))
        self.B = nn.Parameter(torch.zeros(E, shape.out_features))
        routers = {"router_A": kaiming(E, d_in, generator)}
        if config.router != "tied":
            routers["router_B"] = kaiming(E, d_in, generator)
        if config.router == "ifs+cfs":  # U(-1/sqrt(r d_in), ...), as one linear layer from r concatenated factors
            routers["router_AB"] = kaiming(E, d_in, generator, batch=(r,)) / r**0.5
        for name, router in routers.items():  # untrained ones decide as much, so they are saved, too
            if config.router_grad == "none":
                self.register_buffer(name, router)
            else:
                self.register_parameter(name, nn.Parameter(router))

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A,), (self.router_A,) if self.config.router == "tied" else (self.router_A, self.router_B)

    def mix(self, z: Tensor, *logits: Tensor, call: Call) -> Tensor:
        call.check_rows()
        state = call.state
        memory = {} if state is None or (call.training and torch.is_grad_enabled()) else state.memory
        key: tuple[Any, ...] = (call.name, id(self.config))  # in backward, `self` is a copy
        if state is not None:  # some models run one layer at several depths
            if key not in call.turns:  # else in backward
                state.turns[key] = call.turns[key] = state.turns.get(key, 0) + 1
            key = (*key, call.turns[key])
        rows = call.by_row(z)  # (rows, length, E)
        if state is not None and not state.begins and key in memory:
            chosen = tuple(t.repeat_interleave(rows.shape[0] // t.shape[0], dim=0) for t in memory[key])
        else:
            chosen = self.choose([self.pooled(part, call) for part in logits])
            memory[key] = chosen
        index_a, weight_a, index_b, weight_b = chosen
        length, E = rows.shape[1], rows.shape[2]
        u = rows.gather(-1, index_a.unsqueeze(1).expand(-1, length, -1)) * (weight_a * weight_b).unsqueeze(1)
        h = torch.zeros_like(rows).scatter_add(-1, index_b.unsqueeze(1).expand(-1, length, -1), u)
        if call.observed:
            used = z.new_zeros(rows.shape[0], 2 * E).scatter(-1, torch.cat([index_a, index_b + E], 1), 0.5 / self.r)
            pairs = z.new_zeros(rows.shape[0], E * E)
            pairs = pairs.scatter_add(-1, index_a * E + index_b, (weight_a * weight_b).to(pairs)).unflatten(-1, (E, E))
            call.saw_gate(  # both pools: what A's router chose, then what B's did
                call.to_tokens(used), lambda: call.to_tokens(pairs)
            )
        return call.from_rows(h)

    def pooled(self, logits: Tensor, call: Call) -> Tensor:
        """The router's output on the row's mean input, `(rows, E)`: a linear map of a mean is the mean of the maps."""
        valid, device = call.valid_tokens(), logits.device
        counted = torch.ones(call.tokens, dtype=torch.bool, device=device) if valid is None else valid.to(device)
        prompt = None if call.state is None else call.state.prompt
        if self.config.pool == "prompt" and prompt is not None and prompt.numel() == call.tokens:
            prompt = prompt.reshape(-1).to(device)
            has_prompt = call.by_row(prompt).any(1)  # plain text has none
            counted = torch.where(call.to_tokens(has_prompt), prompt, counted)
        weight = counted.to(logits).unsqueeze(-1)
        return call.by_row(logits * weight).sum(1) / call.by_row(weight).sum(1).clamp_min(1)

    def choose(self, logits: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices of the a's `(rows, r)`, their weights, and the same for the b's."""
        p_a = torch.softmax(logits[0], dim=-1)
        index_a = logits[0].topk(self.r, dim=-1).indices
        weight_a = self.weight(p_a, index_a)
        if self.config.router == "tied":
            return index_a, weight_a, index_a, torch.ones_like(weight_a)
        p_b = torch.softmax(logits[1], dim=-1)
        if self.config.router == "ifs+cfs":
            conditional = torch.softmax(self.conditional(index_a), dim=-1).sum(1)
            p_b = p_b + (conditional if self.config.cfs_fusion == "paper" else torch.softmax(conditional, dim=-1))
        index_b = p_b.topk(self.r, dim=-1).indices
        return index_a, weight_a, index_b, self.weight(p_b, index_b)

    def conditional(self, index_a: Tensor) -> Tensor:
        """C_j a_{I_A[j]} for each chosen place j, `(rows, r, E)`."""
        if self.config.cfs_sum_bug:
            return self.A.sum(-1)[index_a].unsqueeze(-1) * self.router_AB.sum(-1)
        # C_j a for every a of the pool, then the chosen ones: E r E numbers instead of a copy of a's per row
        table = torch.einsum("jed,fd->jfe", self.router_AB, self.A)
        return table[torch.arange(self.r, device=index_a.device), index_a]

    def weight(self, p: Tensor, index: Tensor) -> Tensor:
        p = p.gather(-1, index).clamp_min(torch.finfo(p.dtype).tiny)
        if self.config.router_grad == "straight_through":
            return p / p.detach()
        return p if self.config.router_grad == "scored" else torch.ones_like(p)

    def writes(self) -> Tensor:
        return self.B

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        """`gate`: the pairing `(E, E)`, entry (i, j) the weight of a_i with b_j."""
        if gate is None or gate.dim() == 1:  # how often a factor is used does not say with which it is paired
            raise NotMergeable(
                Problem(
                    "Conditional MixLoRA cannot be merged: every row of a batch composes its own update",
                    fix="keep the adapter unmerged, or merge one pairing of factors for all rows: "
                    "headwater.merge_with_gates(model, pairings)",
                )
            )
        if gate.shape != (self.A.shape[0], self.B.shape[0]):
            raise HeadwaterError(f"the pairing is (E, E) = {(self.A.shape[0],) * 2}, not {tuple(gate.shape)}")
        return self.A, self.scaling * (self.B.T @ gate.T.to(self.B))

    def heads(self) -> Heads:
        """Each b is a head: B `(E, d_out, 1)`."""
        return Heads(self.A, self.B.unsqueeze(-1), self.router_A, None, None, self.scaling)


register(
    Method(
        name="cond_mixlora",
        title="Conditional MixLoRA",
        paper="arXiv:2402.15896",
        family="mixture",
        config=CondMixLoraConfig,
        branch=CondMixLoraBranch,
        rank_field="num_factors",  # the pool; r is how many of it a row uses
        heads_field="num_factors",
    )
)
