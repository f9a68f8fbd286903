"""A task-conditioned method, for tests only. That it works everywhere shows that a further method is one file.

y = W x + s B (t_task * A x)          t: one trained vector per task;  loss: penalty * mean |A x|^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwater.methods.base import Branch, LayerShape, Method, MethodConfig, kaiming, merge_refusal, normal, register
from headwater.methods.call import Call


@dataclass
class TaskProbeConfig(MethodConfig):
    num_tasks: int = 3
    penalty: float = 0.0


class TaskProbeBranch(Branch):
    needs_state = True

    def __init__(self, config: TaskProbeConfig, shape: LayerShape, generator: torch.Generator):
        super().__init__(config, shape, generator)
        self.penalty, self.num_tasks = config.penalty, config.num_tasks
        self.has_losses = self.penalty > 0
        self.A = nn.Parameter(kaiming(shape.r, shape.in_features, generator))
        self.B = nn.Parameter(torch.zeros(shape.r, shape.out_features))
        self.table = nn.Parameter(1 + normal(1.0, config.num_tasks, shape.r, generator=generator))

    def reads(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return (self.A,), ()

    def mix(self, u: Tensor, *, call: Call) -> Tensor:
        gate = self.table[call.task_of_token(self.num_tasks)]
        call.saw_gate(gate)
        if call.training and self.penalty > 0:
            call.add_loss("penalty", call.mean_over_tokens(u.square()).sum(), self.penalty)
        return gate * u

    def writes(self) -> Tensor:
        return self.B

    def factors(self, gate: Tensor | None = None, task: int | None = None) -> tuple[Tensor, Tensor]:
        if task is None:
            raise merge_refusal("the task probe")
        return self.table[task].unsqueeze(1) * self.A, self.scaling * self.B.T


METHOD = Method(
    name="taskprobe",
    title="task probe",
    paper="none",
    family="test",
    config=TaskProbeConfig,
    branch=TaskProbeBranch,
    needs_task_ids=True,
)
register(METHOD)
