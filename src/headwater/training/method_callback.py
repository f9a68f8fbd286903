"""What a method does between optimiser steps."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner import MethodLayer


class MethodCallback(TrainerCallback):
    """Calls `after_step(step, total_steps)` of every active branch that has it, after each optimiser step.

    When a branch answers True, the optimiser forgets what it knows: Chain of LoRA has then tied a knot, and stale
    momentum must not reach the fresh link. `HeadwaterTrainer` adds this callback itself; a plain `Trainer` is given it,
    `Trainer(..., callbacks=[MethodCallback()])`.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        changed = False
        for layer in (m for m in (model or nn.Module()).modules() if isinstance(m, MethodLayer)):
            for name in set(layer.active_adapters) & set(layer.branches):
                after_step = getattr(layer.branch(name), "after_step", None)
                if after_step is not None:
                    changed = after_step(state.global_step, state.max_steps) or changed
        if changed and optimizer is not None:
            optimizer.state.clear()
