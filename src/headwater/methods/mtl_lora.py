"""MTL-LoRA: a shared down-projection, a small matrix per task in rank space, and shared up-projections mixed per task.

Yang et al., "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning", arXiv:2410.09437.

    v   = L_t A dropout(x)                    t is the task of x's row
    m_t = softmax(w_t / temperature)          over the n up-projections; no input, so it merges per task
    y   = W x + s (sum_k m_{t,k} B_k) v

Only the batch's own rows of L and w are read, so the number of tasks costs memory but no time. A trained adapter can be
given further tasks: `headwater.add_task`, or `continue_from` in a run's file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HeadwaterError, Problem
from ..ops import widened
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
    register,
)
from .call import Call
from .files import continued_tensors


@dataclass
class MtlLoraConfig(MethodConfig):
    """MTL-LoRA. See `MethodConfig` for the other fields.

    Args:
        num_tasks: T, the number of tasks; a row's task id is in [0, T).
        num_heads: n, the number of shared up-projections.
        temperature: of the softmax over up-projections; small is close to one-hot.
        lambda_format: "full" has an r x r matrix per task, "diag" only its diagonal.
        w_init: "kaiming" draws the mixing logits from U(-1/sqrt(n), 1/sqrt(n)); "zeros" starts with equal mixing, and
            needs heads that differ (`head_init="kaiming"`), or they would stay equal.
        head_init: "zeros" starts at the base model; "kaiming" draws the heads with their mean taken out, which also
            starts at the base model where the mixing starts equal.
        unknown_task: what a row with another id gets: an "error", or the "mean" over tasks of L_t and m_t, which is
            headwater's own. Training with such rows trains all tasks a little.
        continue_from: the folder of another MTL-LoRA adapter, to go on from: all it learned, and its tasks under their
            ids. Tasks beyond those it knows begin as those of `headwater.add_task`. Needed only to make the adapter.
        continued_sha256: checksum of the file that was continued. Set when the adapter is made.
    """

    lora_dropout: float = 0.05
    num_tasks: int = 1
    num_heads: int = 3
    temperature: float = 0.1
    lambda_format: str = "full"
    w_init: str = "kaiming"
    head_init: str = "zeros"
    unknown_task: str = "error"
    continue_from: str | None = None
    continued_sha256: str | None = None

    files = ("continue_from",)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: without the path of the continued adapter once what it held is in this one."""
        return {**super().to_dict(), **({} if self.continued_sha256 is None else {"continue_from": None})}

    def problems(self) -> list[Problem | None]:
        return [
            *super().problems(),
            self.check("num_tasks", self.num_tasks >= 1, "must be at least 1"),
            self.check("num_heads", self.num_heads >= 1, "must be at least 1"),
            self.check("temperature", self.temperature > 0, "must be positive"),
            self.one_of("lambda_format", ("full", "diag")),
            self.one_of("w_init", ("kaiming", "zeros")),
            self.one_of("head_init", ("zeros", "kaiming")),
            self.one_of("unknown_task", ("error", "mean")),
            Problem(
                "equal mixing of zero heads gives every head the same gradient, so they stay equal",
                "w_init",
                "set head_init='kaiming', or keep w_init='kaiming'",
            )
            if self.num_heads > 1 and self.w_init == "zeros" and self.head_init == "zeros"
            else None,
        ]


class MtlLoraBranch(Branch):
    needs_state = True

    def __init__(self, config: MtlLoraConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        T, n, r = config.num_tasks, config.num_heads, shape.r
        self.num_tasks, self.temperature = T, config.temperature
        self.mean_for_unknown, self.w_init = config.unknown_task == "mean", config.w_init
        self.A = nn.Parameter(kaiming(r, shape.in_features, generator))
        B = torch.zeros(n, r, shape.out_features)
        if config.head_init == "kaiming":
            B.copy_(kaiming(shape.out_features, r, generator, batch=(n,)).transpose(1, 2))
            B -= B.mean(0)
        self.B = nn.Parameter(B)
        # named L for the paper's Lambda
        self.L = nn.Parameter(torch.eye(r).repeat(T, 1, 1) if config.lambda_format == "full" else torch.ones(T, r))
        self.w = nn.Parameter(self._fresh_mixing(T, generator))
        if config.continue_from is not None:
            self._continue(config, shape, generator)

    def _fresh_mixing(self, tasks: int, generator: torch.Generator) -> Tensor:
        """Rows of w as training begins with them, `(tasks, n)`."""
        n = self.B.shape[0]
        return kaiming(tasks, n, generator) if self.w_init == "kaiming" else torch.zeros(tasks, n)

    @torch.no_grad()
    def _continue(self, config: MtlLoraConfig, shape: LayerShape, generator: torch.Generator) -> None:
        """Takes over another adapter's tensors; tasks that it does not know are added."""
        found = continued_tensors(config, shape, ("temperature",))
        known = found["w"].shape[0] if "w" in found else 0
        own = {name: getattr(self, name) for name in ("A", "B", "L", "w")}
        rows = {name: (known if name in ("L", "w") else t.shape[0], *t.shape[1:]) for name, t in own.items()}
        there = {name: tuple(t.shape) for name, t in found.items()}
        if there != rows:
            raise HeadwaterError(
                Problem(
                    f"no MTL-LoRA adapter of this layout: layer {shape.name} needs {rows}, it has {there or 'none'}",
                    "continue_from",
                    "continue an adapter of the same base model, r, num_heads, lambda_format and target_modules",
                )
            )
        if known > config.num_tasks:
            raise HeadwaterError(
                Problem(
                    f"the continued adapter knows {known} tasks, this one {config.num_tasks}",
                    "num_tasks",
                    "list its tasks first, in their order; new ones come after them",
                )
            )
        for name in own:
            setattr(self, name, nn.Parameter(widened(found[name])))
        self.num_tasks = known
        for _ in range(config.num_tasks - known):
            self.add_task("mean", generator)

    @torch.no_grad()
    def add_task(self, mixing: str, generator: torch.Generator) -> None:
        """Called by `headwater.add_task`, which says what `mixing` is."""
        r = self.L.shape[-1]
        L = torch.eye(r) if self.L.dim() == 3 else torch.ones(r)
        w = self.w.mean(0, keepdim=True) if mixing == "mean" else self._fresh_mixing(1, generator)
        for name, row in (("L", L.unsqueeze(0)), ("w", w)):
            before = getattr(self, name)
            setattr(self, name, nn.Parameter(torch.cat([before, row.to(before)]), before.requires_grad))
        self.num_tasks += 1

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A,), ()

    def mix(self, z: Tensor, *, call: Call) -> Tensor:
        task = call.task_of_row(None if self.mean_for_unknown else self.num_tasks).to(z.device)
        z = call.by_row(z)  # (rows, length, r): a task's tensors are gathered once a row, not once a token
        L, gate = (t.to(z.dtype) for t in self.of_tasks(task))
        if call.observed:
            call.saw_gate(call.to_tokens(gate))
        # m_t goes into L_t, once a row, so that a token's ranks are touched once: h_k = (m_tk L_t) z
        if L.dim() == 2:
            h = z.unsqueeze(2) * (gate.unsqueeze(2) * L.unsqueeze(1)).unsqueeze(1)
        else:
            h = z @ (gate[:, None, :, None] * L.transpose(1, 2).unsqueeze(2)).flatten(2)
        return call.from_rows(h.flatten(2))

    def of_tasks(self, task: Tensor) -> tuple[Tensor, Tensor]:
        """L_t, `(rows, r, r)` or `(rows, r)`, and m_t, `(rows, n)`, for a LongTensor of tasks."""
        if not self.mean_for_unknown:
            return self.L.index_select(0, task), self.mixing(task)
        T = self.num_tasks
        task = torch.where((task >= 0) & (task < T), task, T)
        m = self.mixing(torch.arange(T, device=task.device))
        L, m = (torch.cat([t, t.mean(0, keepdim=True)]) for t in (self.L, m))
        return L.index_select(0, task), m.index_select(0, task)

    def mixing(self, task: Tensor | int) -> Tensor:
        """m_t, `(n,)` for one task or `(rows, n)` for a LongTensor of tasks."""
        w = self.w[task] if isinstance(task, int) else self.w.index_select(0, task)
        return torch.softmax(widened(w) / self.temperature, dim=-1)

    def writes(self) -> Tensor:
        return self.B.flatten(0, 1)

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        """L_t A and `s sum_k m_{t,k} B_k` of one task; the task may be left out when there is only one."""
        if task is None:
            if self.num_tasks > 1:
                raise NotMergeable(
                    Problem(
                        f"MTL-LoRA has a weight for each of its {self.num_tasks} tasks, so merging needs to know which",
                        fix="headwater.merge_task(model, task)",
                    )
                )
            task = 0
        task = known_task(task, self.num_tasks)
        A = self.L[task] @ self.A if self.L.dim() == 3 else self.L[task].unsqueeze(1) * self.A
        mixed = (self.mixing(task) if gate is None else fixed_gate(gate, self.B.shape[0])).to(self.B)
        return A, self.scaling * torch.einsum("n,nro->or", mixed, self.B)

    def heads(self) -> Heads:
        return Heads(self.A, self.B.transpose(1, 2), None, None, None, self.scaling)


register(
    Method(
        name="mtl_lora",
        title="MTL-LoRA",
        paper="arXiv:2410.09437",
        family="task-conditioned",
        config=MtlLoraConfig,
        branch=MtlLoraBranch,
        needs_task_ids=True,
        heads_field="num_heads",
    )
)
