"""MoE-LoRA: N LoRA experts per linear layer, mixed by a router over tokens or by the row's task.

The common baseline of the field, after MoLA (Gao et al., arXiv:2402.08562), LoRAMoE (Dou et al., arXiv:2312.09979) and
MOELoRA (Liu et al., arXiv:2310.18339, whose gate sees only the task).

    p = softmax(R x)                          per token, in float32, x undropped
    g = p on its k largest, divided by their sum, else 0        (k = 0: all of p)
    y = W x + s sum_n g_n B_n A_n dropout(x)

All experts' ranks are one matmul, gated as blocks: no expert is visited by itself, and none makes a wide tensor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..errors import Problem
from ..ops import spread_heads, widened
from .base import (
    Branch,
    Heads,
    LayerShape,
    Method,
    MethodConfig,
    NotMergeable,
    fixed_gate,
    kaiming,
    known_task,
    merge_refusal,
    normal,
    register,
)
from .call import Call


@dataclass
class ExpertsConfig(MethodConfig):
    """What methods with a top-k mixture of experts share.

    Args:
        num_experts: N.
        experts_pattern: module name or regular expression -> N there; MoLA gives higher layers more.
        top_k: experts a token uses; 0 uses all.
        balance_loss: "mixtral": N sum_e f_e P_e with f counting every slot, k at perfect balance; "mola": the same over
            shares of slots, 1 at balance; "switch": counts only the first choice; "localized": LoRAMoE's, the relative
            variance of expert use with experts reserved for types of tasks; "none". Padding never counts.
        balance_loss_weight: its weight; the loss is averaged over the adapter's layers, so the weight means the same at
            any depth.
        z_loss_weight: weight of mean(logsumexp(R x)^2).
        task_types: for "localized", the type, 0 or 1, of each task; type 1 owns the first half of the experts.
        localized_delta: how strongly "localized" favours a row's own experts.
    """

    lora_dropout: float = 0.05
    num_experts: int = 8
    experts_pattern: dict[str, int] = field(default_factory=dict)
    top_k: int = 2
    balance_loss: str = "none"
    balance_loss_weight: float = 1e-3
    z_loss_weight: float = 0.0
    task_types: list[int] | None = None
    localized_delta: float = 0.1

    def problems(self) -> list[Problem | None]:
        types = self.task_types or []
        wrong = {key: N for key, N in self.experts_pattern.items() if not isinstance(N, int) or N < 1}
        counts = [self.num_experts, *(N for key, N in self.experts_pattern.items() if key not in wrong)]
        return [
            *super().problems(),
            self.check("num_experts", self.num_experts >= 1, "must be at least 1"),
            Problem(f"experts_pattern needs whole numbers of at least 1, not {wrong}", "experts_pattern")
            if wrong
            else None,
            self.check("top_k", self.top_k >= 0, "must not be negative"),
            Problem(
                f"top_k {self.top_k} is larger than num_experts {min(counts)}",
                "top_k",
                f"use top_k <= {min(counts)}; 0 uses all experts",
            )
            if self.top_k > min(counts)
            else None,
            self.one_of("balance_loss", ("none", "mixtral", "mola", "switch", "localized")),
            Problem(
                f"balance_loss={self.balance_loss!r} is constant when every token uses all experts",
                "balance_loss",
                "use 0 < top_k < num_experts, or 'switch', which counts first choices alone",
            )
            if self.balance_loss in ("mixtral", "mola") and self.top_k in (0, self.num_experts)
            else None,
            self.check("balance_loss_weight", self.balance_loss_weight >= 0, "must not be negative"),
            self.check("z_loss_weight", self.z_loss_weight >= 0, "must not be negative"),
            self.check("localized_delta", 0 <= self.localized_delta < 1, "must be in [0, 1)"),
            Problem(
                "balance_loss='localized' needs the type, 0 or 1, of each task and an even num_experts",
                "task_types",
                "e.g. task_types: [1, 0, 0], one entry per task in the order of the tasks",
            )
            if self.balance_loss == "localized" and (not types or set(types) - {0, 1} or any(N % 2 for N in counts))
            else None,
        ]

    def experts_on(self, layer: str) -> int:
        """N on the layer of that name."""
        return self.experts_pattern.get(get_pattern_key(list(self.experts_pattern), layer), self.num_experts)

    def problems_with_tasks(self, count: int) -> list[Problem | None]:
        types = len(self.task_types or [])
        return [
            *super().problems_with_tasks(count),
            Problem(f"task_types has {types} entries, but there are {count} tasks", "task_types", "give one per task")
            if self.balance_loss == "localized" and types != count
            else None,
        ]


@dataclass
class MoeLoraConfig(ExpertsConfig):
    """MoE-LoRA; `r` is the rank of one expert. See `ExpertsConfig` and `MethodConfig` for the other fields.

    LoRAMoE is `top_k=0, num_experts=8, r=4` on the feed-forward layers. MOELoRA is `router="task", top_k=0`,
    `expert_init="normal"`; it divides alpha by the rank of all experts together, so give alpha / N here.

    Args:
        router: "token" routes by x, with a router per layer; "task" by the row's task alone, with one gate for the
            whole model, softmax(G e_task), which merges exactly per task.
        num_tasks: number of tasks, for `router="task"`.
        task_dim: width of the task embedding, for `router="task"`.
        expert_init: how A_n start: "kaiming", or "normal" for N(0, 0.01^2).
    """

    router: str = "token"
    num_tasks: int = 1
    task_dim: int = 64
    expert_init: str = "kaiming"

    @property
    def needs_task_ids(self) -> bool:
        return self.router == "task"

    def problems(self) -> list[Problem | None]:
        return [
            *super().problems(),
            self.one_of("router", ("token", "task")),
            self.one_of("expert_init", ("kaiming", "normal")),
            self.check("num_tasks", self.num_tasks >= 1, "must be at least 1"),
            self.check("task_dim", self.task_dim >= 1, "must be at least 1"),
            Problem("router='task' has one gate for the whole model, so one number of experts", "experts_pattern")
            if self.router == "task" and self.experts_pattern
            else None,
        ]


def choose(p: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Keeps each token's k largest probabilities.

    Args:
        p: `(tokens, N)`. top_k: k; 0 or N keeps all.

    Returns:
        The gate `(tokens, N)`, kept entries divided by their sum and exact zeros elsewhere, and the chosen experts,
        LongTensor `(tokens, k)`, best first. With k = 1 that quotient is 1 whatever the router says, so the sum is
        taken as a constant there and the router still learns.
    """
    values, chosen = p.topk(top_k or p.shape[-1], dim=-1)
    if chosen.shape[-1] == p.shape[-1]:
        return p, chosen
    total = values.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, chosen, values / (total.detach() if top_k == 1 else total)), chosen


def balance_loss(kind: str, p: Tensor, chosen: Tensor, mean: Any = None) -> Tensor:
    """A load-balancing loss of one router; only the probabilities carry gradient, counts do not.

    Args:
        kind: "mixtral", "mola" or "switch". p: `(tokens, N)`. chosen: LongTensor `(tokens, k)`, best first.
        mean: mean over tokens, `(tokens, N) -> (N,)`; by default of all tokens.
    """
    mean = mean or (lambda values: values.mean(0))
    N, k = p.shape[-1], chosen.shape[-1]
    counted = chosen[:, :1] if kind == "switch" else chosen
    slots = torch.zeros_like(p).scatter_add(-1, counted, torch.ones_like(counted, dtype=p.dtype))
    f = mean(slots) / (k if kind == "mola" else 1)
    return N * (f * mean(p)).sum()


def localized_loss(gate: Tensor, types: Tensor, delta: float) -> Tensor:
    """LoRAMoE's loss: the variance of weighted expert use over its squared mean.

    Args:
        gate: `(rows, N)`, gates summed over a row's tokens. types: `(rows,)`, 1 where the first half of the experts is
            the row's own, 0 where the second half is. delta: own experts weigh 1 + delta, others 1 - delta.
    """
    first = torch.arange(gate.shape[-1], device=gate.device) < gate.shape[-1] // 2
    own = first == (types.unsqueeze(-1) == 1)
    weighted = gate * (1 + delta * torch.where(own, 1.0, -1.0).to(gate))
    return weighted.var() / (weighted.mean() ** 2 + 1e-10)


def _on_device(types: tuple[int, ...], device: torch.device) -> Tensor:
    """The types of the tasks, `(tasks,)`."""
    return torch.tensor(types, device=device)


_copied_once = functools.cache(_on_device)  # because an accelerator is waited for


class ExpertsBranch(Branch):
    """The routing of top-k experts and its losses; a subclass has the experts."""

    def __init__(self, config: ExpertsConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        self.num_experts, self.top_k = config.experts_on(shape.name), config.top_k
        self.balance = config.balance_loss if config.balance_loss_weight > 0 else "none"
        self.balance_weight, self.z_weight = config.balance_loss_weight, config.z_loss_weight
        self.task_types, self.delta = config.task_types, config.localized_delta
        self.needs_state = self.has_losses = self.balance != "none" or self.z_weight > 0
        self._routers = shape.shared.setdefault("routers", [])  # one list for all layers: how many to average over
        self._routers.append(shape.name)

    def route(self, logits: Tensor, call: Call) -> Tensor:
        """The gate `(tokens, N)` from the router's logits; adds the losses."""
        p = torch.softmax(logits, dim=-1)
        gate, chosen = choose(p, self.top_k)
        call.saw_gate(gate)
        if call.training:
            share = 1 / len(self._routers)
            if self.balance == "localized":
                call.add_loss("balance", self.localized(gate, call), self.balance_weight * share)
            elif self.balance != "none":
                loss = balance_loss(self.balance, p, chosen, call.mean_over_tokens)
                call.add_loss("balance", loss, self.balance_weight * share)
            if self.z_weight > 0:
                z = call.mean_over_tokens(torch.logsumexp(logits, -1, keepdim=True) ** 2).sum()
                call.add_loss("router_z", z, self.z_weight * share)
        return gate

    def localized(self, gate: Tensor, call: Call) -> Tensor:
        make = _on_device if torch.compiler.is_compiling() else _copied_once  # a compiler takes no cached functions
        types = make(tuple(self.task_types or ()), gate.device)
        tasks = call.task_of_row(len(types)).to(gate.device)
        valid = call.valid_tokens()
        counted = gate if valid is None else gate * valid.to(gate).unsqueeze(-1)
        return localized_loss(call.by_row(counted).sum(1), types[tasks], self.delta)


def whole(parameter: Any) -> Tensor:
    """A parameter of another layer, gathered where FSDP2 has it in shards, as it has outside that layer's own forward
    and backward. Gradients are averaged over the ranks, as FSDP2 does."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    if not torch.is_grad_enabled():
        return parameter.full_tensor()
    from torch.distributed.tensor import Partial

    mesh = parameter.device_mesh
    gathered = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if gathered.requires_grad:
        gathered.register_hook(lambda grad: grad / mesh.size())
    return gathered


class MoeLoraBranch(ExpertsBranch):
    def __init__(self, config: MoeLoraConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        N, r, d_in = self.num_experts, shape.r, shape.in_features
        self.by_task, self.num_tasks = config.router == "task", config.num_tasks
        kaiming_init = config.expert_init == "kaiming"
        A = kaiming(r, d_in, generator, batch=(N,)) if kaiming_init else normal(0.01, N, r, d_in, generator=generator)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(torch.zeros(N, r, shape.out_features))
        if not self.by_task:
            self.chooses_by = 1 if self.top_k else None
            self.router = nn.Parameter(kaiming(N, d_in, generator))
            return
        self.needs_state = True
        # The first layer owns the gate of the whole model; in a tuple, or it would be registered, and saved, again.
        self._gate_owner: tuple[MoeLoraBranch, ...] = (shape.shared.setdefault("gate_owner", self),)
        if self._gate_owner[0] is self:
            self.task_embedding = nn.Parameter(normal(1.0, config.num_tasks, config.task_dim, generator=generator))
            self.task_gate = nn.Parameter(kaiming(N, config.task_dim, generator))

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A.flatten(0, 1),), () if self.by_task else (self.router,)

    def mix(self, z: Tensor, *logits: Tensor, call: Call) -> Tensor:
        if self.by_task:
            rows = self.task_logits(call.task_of_row(self.num_tasks)).to(z)
            gate = self.route(call.to_tokens(rows), call)
        else:
            gate = self.route(logits[0], call)
        return spread_heads(z.unflatten(-1, (self.num_experts, -1)), gate)

    def task_logits(self, task: Tensor) -> Tensor:
        held = self.__dict__.pop("_whole", None)  # what `mixes` gave, or stands for it
        embedding, gate = (widened(t) for t in held or self._task_tensors())
        return F.linear(embedding.index_select(0, task.to(gate.device)), gate)  # [-1] would be the last task

    def _task_tensors(self) -> tuple[Tensor, Tensor]:
        owner = self._gate_owner[0]
        # offloaded, they are on the meta device outside their own layer's forward
        here = align_module_device(owner) if owner.task_gate.is_meta else contextlib.nullcontext()
        with here:
            return whole(owner.task_embedding), whole(owner.task_gate)

    def mixes(self) -> tuple[Tensor, ...]:
        own = super().mixes()
        if not self.by_task or self._gate_owner[0] is self:
            return own
        self.__dict__["_whole"] = self._task_tensors()
        return *own, *self.__dict__["_whole"]

    def as_then(self, others: Sequence[Tensor]) -> Branch:
        twin = super().as_then(others)
        if self.by_task:
            twin.__dict__["_whole"] = tuple(others[-2:])  # the owner's own are its last
        return twin

    def writes(self) -> Tensor:
        return self.B.flatten(0, 1)

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        if gate is None and self.by_task:
            if task is None and self.num_tasks > 1:
                raise NotMergeable(
                    Problem(
                        f"the gates differ between the {self.num_tasks} tasks, so merging needs to know which",
                        fix="headwater.merge_task(model, task)",
                    )
                )
            logits = self.task_logits(torch.tensor([known_task(task or 0, self.num_tasks)]))
            gate = choose(torch.softmax(logits, -1), self.top_k)[0][0]
        if gate is None:
            if self.num_experts > 1:
                raise merge_refusal("MoE-LoRA")
            gate = torch.ones(1)
        gated = fixed_gate(gate, self.num_experts).to(self.B).view(-1, 1, 1) * self.B
        return self.A.flatten(0, 1), self.scaling * gated.flatten(0, 1).T

    def heads(self) -> Heads:
        """A is all experts' stacked, `(N r, d_in)`."""
        router = None if self.by_task else self.router
        return Heads(self.A.flatten(0, 1), self.B.transpose(1, 2), router, None, None, self.scaling)


register(
    Method(
        name="moe_lora",
        title="MoE-LoRA",
        paper="arXiv:2402.08562",
        family="mixture",
        config=MoeLoraConfig,
        branch=MoeLoraBranch,
        heads_field="num_experts",
    )
)
