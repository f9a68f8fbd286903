"""The `meta:` section of a file for `headwater meta`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from ..config import RunConfig
from ..errors import HeadwaterError, Problem
from .cvae import CHANNELS
from .task_vector import Position


class TaskVectorSpec(BaseModel):
    """How a task becomes a vector; the arguments of `task_vector`."""

    model_config = ConfigDict(extra="forbid")

    layer: int = -1
    position: Position = "last_prompt_token"
    samples: int = Field(30, ge=1)
    normalize: bool = True


class MetaSpec(BaseModel):
    """What is collected, and how the generator learns it.

    Args:
        checkpoints: adapters kept of each task's training, its last ones.
        every: steps between them.
        task_vector: how a task becomes a vector.
        origin: "mean" subtracts the mean of all collected adapters first and keeps it in the generator: from a common
            start, most of an adapter is that start. "none" is the paper's.
        stats: "per_task_mean" normalises each tensor by its task's own mean and deviation; "pooled" by all tasks'.
        latent, channels: sizes of the autoencoder. Each channel halves the signal.
        beta: weight of the KL term.
        kl_warmup: steps over which that weight rises from 0.
        steps, learning_rate, rows_per_task: of the generator's training; each batch has so many adapters of each task.
        save_steps: steps between its checkpoints.
        leave_one_out: also train a generator without each task in turn and score what it writes for that task.
    """

    model_config = ConfigDict(extra="forbid")

    checkpoints: int = Field(20, ge=2)
    every: int = Field(1, ge=1)
    task_vector: TaskVectorSpec = Field(default_factory=TaskVectorSpec)
    origin: Literal["mean", "none"] = "mean"
    stats: Literal["per_task_mean", "pooled"] = "per_task_mean"
    latent: int = Field(256, ge=1)
    channels: tuple[int, ...] = CHANNELS
    beta: float = Field(0.005, ge=0, allow_inf_nan=False)
    kl_warmup: int = Field(0, ge=0)
    steps: int = Field(400, ge=1)
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    rows_per_task: int = Field(1, ge=1)
    save_steps: int = Field(100, ge=1)
    leave_one_out: bool = False

    @field_validator("channels")
    @classmethod
    def _channels_are_widths(cls, channels: tuple[int, ...]) -> tuple[int, ...]:
        if not channels or min(channels) < 1:
            raise ValueError("give at least one width, each at least 1")
        return channels


class MetaConfig(RunConfig):
    """A run's file with a `meta:` section: its tasks are trained one by one, with plain LoRA."""

    meta: MetaSpec = Field(default_factory=MetaSpec)

    @model_validator(mode="after")
    def _fits_a_generator(self) -> Self:
        problems = []
        if self.method["name"] != "lora":
            what = f"the generator writes plain LoRA, so it learns from plain LoRA, not {self.method['name']!r}"
            problems.append(Problem(what, "method.name", "method: {name: lora, ...}"))
        if len(self.tasks) < 2:
            what = "a generator needs at least two tasks to tell apart"
            problems.append(Problem(what, "tasks"))
        # `test` is asked for before hours of collecting, after which the tasks cannot be changed any more.
        problems += [
            Problem(f"{task.name} has no `{split}` rows: {use}", "tasks", f"give the task a `{split}`")
            for task in self.tasks
            for split, use in (("train", "every task is trained by itself"), ("test", "every task is scored"))
            if getattr(task, split) is None
        ]
        steps, needed = self.training.get("max_steps", -1), (self.meta.checkpoints - 1) * self.meta.every + 1
        if steps < needed:
            what = f"{self.meta.checkpoints} checkpoints every {self.meta.every} steps need {needed} steps, not {steps}"
            problems.append(Problem(what, "training.max_steps", "raise it, or lower meta.checkpoints"))
        if self.align is not None:
            problems.append(Problem("tasks are trained one by one, so there is nothing to align", "align"))
        if problems:
            raise HeadwaterError(*problems)
        return self
