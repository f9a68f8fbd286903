"""Tells of trained parameters that training never reaches."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STEPS = 20
"""Optimiser steps until it is said; a run of fewer says it at its end."""


class NoGradientCallback(TrainerCallback):
    """Warns once of trained parameters that have had no gradient in the first steps.

    No row runs through their layers then, as through the image encoder of a model that is trained on text alone. They
    stay as they began, but count among the parameters, and are saved and exported. Where a parameter's gradient is not
    its own (DeepSpeed), nothing is said.
    """

    def __init__(self) -> None:
        self._left: dict[str, nn.Parameter] = {}
        self._all = self._until = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        named = () if model is None else model.named_parameters()
        self._left = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._all, self._until = len(self._left), min(state.global_step + STEPS, state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._left = {name: parameter for name, parameter in self._left.items() if parameter.grad is None}
        if not self._left or state.global_step + 1 < self._until:
            return
        names, self._left = list(self._left), {}
        if len(names) < self._all and state.is_world_process_zero:
            warnings.warn(
                f"{len(names):,} of {self._all:,} trained parameters have had no gradient so far, such as {names[0]}: "
                "no row runs through their layers. method.exclude_modules leaves layers out",
                stacklevel=2,
            )
