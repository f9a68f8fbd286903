"""What a training run keeps count of."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from ..errors import DivergedError, Problem
from .folder import last_checkpoint
from .history import AUXILIARY_LOSS, TASK_LOSS
from .resume import SAVED, check_state, describe

if TYPE_CHECKING:
    from .trainer import HeadwaterTrainer


def real_tokens(batch: Mapping[str, Tensor]) -> Tensor | int:
    """How many tokens of a batch are not padding; one without a mask has none."""
    return batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()


class Accounts(TrainerCallback):
    """Keeps a trainer's books: losses per task, tokens, time, and whether all is finite."""

    def __init__(self, trainer: HeadwaterTrainer):
        self.trainer = trainer
        self.tokens = 0  # that are not padding, all ranks
        self.slots = 0  # padding included
        self._earlier_seconds = 0.0
        self._started: float | None = None
        self._step: Tensor | None = None
        self._trained: list[Tensor] = []
        self._sums = [0.0] * len(trainer.task_names)
        self._counts = [0.0] * len(trainer.task_names)
        self._auxiliary: dict[str, Tensor] = {}
        self._window = (0, 0, 0.0)  # steps, tokens and seconds when the window opened

    def add(self, losses: Tensor, items: Tensor, tasks: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """Adds a batch, on its device and without waiting for it. losses, items, tasks: `[batch]`."""
        n = len(self.trainer.task_names)
        books = losses.new_zeros(2 * n + 2)
        books[:n].index_add_(0, tasks, losses)
        books[n : 2 * n].index_add_(0, tasks, items.to(losses))
        books[-2] = real_tokens(inputs)
        books[-1] = inputs["input_ids"].numel()
        self._step = books if self._step is None else self._step + books

    def add_auxiliary(self, losses: Mapping[str, Tensor], share: Tensor | float) -> None:
        """Adds a batch's auxiliary losses by name; `share` is the batch's part of its optimiser step."""
        for name, loss in losses.items():
            of_batch = share.to(loss.device) if isinstance(share, Tensor) else share
            self._auxiliary[name] = self._auxiliary.get(name, 0) + loss.detach() * of_batch

    @property
    def seconds(self) -> float:
        """Time spent training, earlier parts of a resumed run included, evaluations not."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started - self.trainer.excluded_seconds
        return self._earlier_seconds + running

    def close_window(self) -> dict[str, float]:
        """Means since the last call: loss per task drawn, auxiliary losses, tokens per second."""
        names = self.trainer.task_names
        logs = {
            TASK_LOSS + name: total / count
            for name, total, count in zip(names, self._sums, self._counts, strict=True)
            if count > 0
        }
        steps, tokens, seconds = self._window
        now, step = self.seconds, self.trainer.state.global_step
        for name, total in self._auxiliary.items():
            mean = self.trainer.accelerator.reduce(total, "mean") / max(step - steps, 1)
            logs[AUXILIARY_LOSS + name] = float(mean)
        logs["tokens_per_second"] = (self.tokens - tokens) / max(now - seconds, 1e-9)
        self._window, self._auxiliary = (step, self.tokens, now), {}
        self._sums, self._counts = [0.0] * len(names), [0.0] * len(names)
        return logs

    def restore(self, state: TrainerState) -> None:
        """Takes over the books of the checkpoint that `state` is from.

        Raises:
            HeadwaterError: if it was trained on another mixture, or with other settings.
        """
        self._about = describe(self.trainer)
        self.tokens = self.slots = 0
        self._earlier_seconds = 0.0
        books: Any = state.stateful_callbacks  # a dict, though annotated as a list
        saved = books.get(SAVED)
        if saved and state.global_step:
            check_state(self.trainer, saved)
            self.tokens, self.slots = saved["tokens"], saved["slots"]
            self._earlier_seconds = saved["train_seconds"]
            self.trainer.activation_bytes = saved.get("activation_bytes")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = None
        self._trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.restore(state)
        state.compute_steps(args, state.max_steps)  # else a resumed run logs, scores and saves as often as before
        self.trainer.excluded_seconds = 0.0
        self._started = time.perf_counter()
        self._window = (state.global_step, self.tokens, self.seconds)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._earlier_seconds, self._started = self.seconds, None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer does not reach the sampler when a run over several ranks is resumed.
        self.trainer.sampler.set_epoch(self.place(state.global_step)["epoch"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if self._step is None:
            return
        books, self._step = self._step, None
        if trainer.accelerator.num_processes > 1:
            books = trainer.accelerator.reduce(books, "sum")
        # The one place in a step where the host waits for the device: before the weights change.
        *values, norm = torch.cat([books, self._gradient_norm().to(books).reshape(1)]).tolist()
        n = len(trainer.task_names)
        sums, counts = values[:n], values[n : 2 * n]
        bad = [name for name, value in zip(trainer.task_names, sums, strict=True) if not math.isfinite(value)]
        if bad or not math.isfinite(norm):
            drawn = [name for name, count in zip(trainer.task_names, counts, strict=True) if count > 0]
            raise self._not_finite("loss" if bad else "gradient", state.global_step + 1, bad or drawn)
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)]
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        self.tokens += int(values[-2])
        self.slots += int(values[-1])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer writes this into the `trainer_state.json` of a checkpoint.
        state.stateful_callbacks[SAVED] = {
            **self._about,
            "tokens": self.tokens,
            "slots": self.slots,
            "train_seconds": self.seconds,
            "activation_bytes": self.trainer.activation_bytes,
        }

    def _gradient_norm(self) -> Tensor:
        # With a loss scaler an overflow is expected: it skips the step.
        if self.trainer.accelerator.scaler is None:
            gradients = [p.grad for p in self._trained if p.grad is not None]
            if gradients:
                return torch.nn.utils.get_total_norm(gradients)
        return torch.zeros(())

    def place(self, step: int) -> dict[str, int]:
        """Epoch and batches drawn in it after `step` optimiser steps, all ranks together."""
        ranks = self.trainer.accelerator.num_processes
        accumulation = self.trainer.args.gradient_accumulation_steps
        steps = self.trainer.steps_per_epoch
        return {"epoch": step // steps, "batches": step % steps * accumulation * ranks}

    def _not_finite(self, what: str, step: int, tasks: Sequence[str]) -> DivergedError:
        last = last_checkpoint(Path(str(self.trainer.args.output_dir)))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written before"
        return DivergedError(
            Problem(
                f"the {what} became non-finite at step {step}, in task {', '.join(tasks)}",
                "training",
                f"{kept}; lower learning_rate, or look for broken rows in that task",
            )
        )
