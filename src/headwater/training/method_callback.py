"""What a method does between optimiser steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import HeadwaterError, Problem
from ..methods.base import Branch
from ..methods.registry import method as registered
from ..tuner import MethodLayer
from .gate_monitor import GateCallback


class MethodCallback(GateCallback):
    """Calls what active branches have for an optimiser's steps. `HeadwaterTrainer` adds this callback itself; a plain
    `Trainer` is given it, `Trainer(..., callbacks=[MethodCallback()])`.

    `before_training(total_steps)` may refuse a run.
    `after_step(step, total_steps)` runs after each optimiser step. When a branch answers True, the optimiser forgets
    what it knows: Chain of LoRA has then tied a knot, and stale momentum must not reach the fresh link.
    `learning_rate_factor(step, total_steps)`, unless it is None, takes the place of the trainer's schedule.
    Gates are watched, see `GateCallback`, as long as one adapter is active.
    """

    def __init__(self) -> None:
        super().__init__()
        self._layers: list[MethodLayer] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        super().on_train_begin(args, state, control, model)
        # Found once: to walk over all modules takes a millisecond, and layers that come later are not trained.
        self._layers = method_layers(model)
        check_steps(self._layers, state.max_steps)
        factors = (getattr(branch, "learning_rate_factor", None) for branch in active_branches(self._layers))
        factor = next((f for f in factors if f is not None), None)
        if factor is None:
            return
        if not isinstance(lr_scheduler, LambdaLR):
            what = f"lr_policy: restart sets the learning rate itself and cannot with a {type(lr_scheduler).__name__}"
            raise HeadwaterError(Problem(what, "lr_scheduler_type", "use lr_scheduler_type: linear"))
        lr_scheduler.lr_lambdas = [lambda step: factor(step, state.max_steps)] * len(lr_scheduler.lr_lambdas)
        now = factor(lr_scheduler.last_epoch, state.max_steps)
        lr_scheduler._last_lr = [base * now for base in lr_scheduler.base_lrs]
        for group, rate in zip(optimizer.param_groups, lr_scheduler._last_lr, strict=True):
            group["lr"] = rate

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.gates is not None and (layer := _with_several_gates(self._layers)) is not None:
            self.close()  # recording would be refused, and training goes on without it
            if state.is_world_process_zero:
                several = f"{layer.name} has several active adapters, whose gates would be mixed"
                warnings.warn(f"gates are not watched any more: {several}", stacklevel=2)
        super().on_step_begin(args, state, control)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().on_step_end(args, state, control)
        changed = False
        for branch in active_branches(self._layers):
            after_step = getattr(branch, "after_step", None)
            if after_step is not None:
                changed = after_step(state.global_step, state.max_steps) or changed
        if changed and optimizer is not None:
            optimizer.state.clear()


def check_steps(layers: Iterable[MethodLayer], total_steps: int) -> None:
    """Asks the active branches whether a run of so many steps can be.

    Raises:
        HeadwaterError: if one refuses.
    """
    for branch in active_branches(layers):
        check = getattr(branch, "before_training", None)
        if check is not None:
            check(total_steps)


def method_layers(model: nn.Module | None) -> list[MethodLayer]:
    """The adapted layers of a model."""
    return [] if model is None else [m for m in model.modules() if isinstance(m, MethodLayer)]


def _with_several_gates(layers: Iterable[MethodLayer]) -> MethodLayer | None:
    """A layer on which several adapters are active, of a method that has gates."""
    for layer in layers:
        active = [name for name in layer.active_adapters if name in layer.branches]
        if len(active) > 1 and not registered(layer.method_name).mergeable:
            return layer
    return None


def active_branches(layers: Iterable[MethodLayer]) -> Iterator[Branch]:
    """The active adapters' branches, layer by layer."""
    for layer in layers:
        for name in layer.active_adapters:
            if name in layer.branches:
                yield layer.branch(name)
