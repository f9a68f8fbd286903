"""SMoRA: every single rank of one LoRA is an expert, and each token uses its k best.

Zhao et al., "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
arXiv:2501.15103.

    q = sigmoid(R x) + b                      a score per rank (or block of ranks), in float32
    g = q on its k largest, divided by their sum, else 0
    y = W x + alpha B ( g * (A x) )           mean active gate 1/k

b balances the load without a loss: a rank used less than the average is nudged up by u, one used more is nudged down.
It is a buffer without gradient, moved once per optimiser step from what the step's batches chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import Problem
from .base import Branch, Heads, LayerShape, Method, MethodConfig, fixed_gate, kaiming, merge_refusal, register
from .call import Call


@dataclass
class SMoraConfig(MethodConfig):
    """SMoRA; `r` is the number of ranks altogether. See `MethodConfig` for the other fields. The scale is alpha itself.

    Args:
        top_k: ranks a token uses.
        gate: "sigmoid" as released, or "softmax" over the chosen ranks' R x, as the paper describes it.
        bias_in_gate: the balancing bias takes part in the gate's value, as released; if False it only chooses.
        balance: "loss_free" moves the bias, "none" leaves it at 0.
        bias_update_rate: u, the size of one nudge.
        rank_block: ranks that share a score and are chosen together.
    """

    r: int = 64
    top_k: int = 8
    gate: str = "sigmoid"
    bias_in_gate: bool = True
    balance: str = "loss_free"
    bias_update_rate: float = 1e-5
    rank_block: int = 1

    def problems(self) -> list[Problem | None]:
        block = max(self.rank_block, 1)
        return [
            *super().problems(),
            self.check("top_k", 1 <= self.top_k <= self.r, f"must be between 1 and r = {self.r}"),
            self.one_of("gate", ("sigmoid", "softmax")),
            self.one_of("balance", ("loss_free", "none")),
            self.check("bias_update_rate", self.bias_update_rate >= 0, "must not be negative"),
            self.check("rank_block", self.rank_block >= 1, "must be at least 1"),
            Problem(
                f"rank_block {block} must divide r {self.r}, every rank of rank_pattern, and top_k {self.top_k}",
                "rank_block",
            )
            if self.top_k % block or any(r % block for r in (self.r, *self.rank_pattern.values()))
            else None,
            Problem("SMoRA's scale is lora_alpha itself, whatever the rank", "use_rslora", "leave use_rslora out")
            if self.use_rslora
            else None,
        ]

    def scaling(self, r: int, alpha: float) -> float:
        return alpha


class SMoraBranch(Branch):
    chooses_by = 1

    bias: Tensor
    counts: Tensor

    def __init__(self, config: SMoraConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        r, d_in, self.block = shape.r, shape.in_features, config.rank_block
        self.k = min(config.top_k, r) // self.block
        self.softmax, self.bias_in_gate = config.gate == "softmax", config.bias_in_gate
        self.rate = config.bias_update_rate if config.balance == "loss_free" else 0.0
        self.needs_state = self.meets_ranks = self.rate > 0
        self.A = nn.Parameter(kaiming(r, d_in, generator))
        self.B = nn.Parameter(torch.zeros(r, shape.out_features))
        self.router = nn.Parameter(kaiming(r // self.block, d_in, generator))
        self.register_buffer("bias", torch.zeros(r // self.block))
        # Saved, so that a run resumed right after an optimiser step moves the bias as one that never stopped.
        self.register_buffer("counts", torch.zeros(r // self.block))
        self._bits_of_B: Tensor | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Nudges are small and counts large, so both stay float32 where the adapter is asked to be half precision.
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.device.type != "meta"}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            wide = torch.promote_types(buffer.dtype, torch.float32)
            setattr(self, name, exact.get(name, buffer).to(buffer.device, wide))
        return self

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A, self.router), ()  # one dropped x for both

    def mix(self, z: Tensor, logits: Tensor, *, call: Call) -> Tensor:
        balancing = call.training and self.rate > 0
        if balancing and call.first_time:
            self.move_bias()
        gate, chosen = self.route(logits)
        call.saw_gate(gate)
        if balancing and self.counts_here(call):
            self.count(chosen, call)
        return z * (gate / self.block).repeat_interleave(self.block, dim=-1)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The gate per block, `(tokens, r / block)`, summing to 1, and the chosen blocks `(tokens, k)`."""
        scores = logits if self.softmax else torch.sigmoid(logits)
        biased = scores + self.bias.to(scores.dtype)
        chosen = biased.topk(self.k, dim=-1).indices
        values = (biased if self.bias_in_gate else scores).gather(-1, chosen)
        shifted = values - values.detach().amax(-1, keepdim=True)
        values = shifted.exp() if self.softmax else values.clamp_min(1e-6)  # a biased sigmoid can fall below 0
        total = values.sum(-1, keepdim=True)
        values = values / (total.detach() if self.k == 1 else total)  # one alone is always 1; this way it still learns
        return torch.zeros_like(scores).scatter(-1, chosen, values), chosen

    def counts_here(self, call: Call) -> bool:
        """Whether to count: once per forward, and only where gradients are taken.

        Reentrant checkpointing takes them in the recomputation alone, other checkpointing in both runs of a layer.
        """
        memory = {} if call.state is None else call.state.memory  # in training, one forward's
        key = ("counted", id(self))
        if not call.learns or call.again or key in memory:
            return False
        memory[key] = True
        return True

    @torch.no_grad()
    def count(self, chosen: Tensor, call: Call) -> None:
        """Counts how many tokens, padding aside, chose each block; on all ranks together.

        Ranks share their counts here, not when the bias moves: DistributedDataParallel copies the first rank's buffers
        to all others before each forward.
        """
        valid = call.valid_tokens()
        weight = torch.ones(chosen.shape[0], device=chosen.device) if valid is None else valid.to(chosen.device).float()
        new = torch.zeros_like(self.counts, dtype=torch.float32)
        new.index_add_(0, chosen.flatten(), weight.repeat_interleave(self.k))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(new)
        self.counts += new

    @torch.no_grad()
    def move_bias(self) -> None:
        """Moves the bias once for each optimiser step, at the first forward after it.

        An optimiser step is seen by B's bits having changed, so no trainer or callback is needed, and neither
        accumulation nor recomputation moves the bias twice. A step at learning rate 0 counts with the next one.
        (Tensor versions will not do: fused optimisers leave them as they are.)
        """
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.B.element_size()]
        before, now = self._bits_of_B, self.B.view(whole).sum()
        stepped = torch.ones_like(now, dtype=torch.bool) if before is None else before.to(now.device) != now
        self._bits_of_B = now
        self.bias += stepped * self.rate * torch.sign(self.counts.mean() - self.counts)  # no wait for an accelerator
        self.counts *= ~stepped

    def writes(self) -> Tensor:
        return self.B

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        """`gate`: `(r / block,)`, for instance the mean over some tokens, which adds up to 1."""
        if gate is None:
            raise merge_refusal("SMoRA")
        ranks = fixed_gate(gate, self.router.shape[0]).to(self.B) / self.block
        ranks = ranks.repeat_interleave(self.block)
        return self.A, self.scaling * ranks * self.B.T

    def heads(self) -> Heads:
        """Each block of ranks is a head: B `(r / block, d_out, block)`."""
        B = self.B.unflatten(0, (-1, self.block)).transpose(1, 2)
        return Heads(self.A, B, self.router, None, None, self.scaling)


register(
    Method(
        name="smora",
        title="SMoRA",
        paper="arXiv:2501.15103",
        family="mixture",
        config=SMoraConfig,
        branch=SMoraBranch,
    )
)
