"""Training settings: transformers' own, with defaults that suit low-rank adapters, and two more keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import torch._dynamo
import torch._inductor
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import trainer_log_levels
from transformers.utils import is_liger_kernel_available

from ..errors import HeadwaterError, Problem
from ..seeds import RANGE, is_seed

LossNormalization = Literal["example", "token"]
SHARES = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
LEAST = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers", "eval_steps"), 0),
    **dict.fromkeys(("adam_epsilon", "neftune_noise_alpha", "save_steps", "logging_steps", *SHARES), 0),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_prefetch_factor"), 1),
}
BELOW = {**dict.fromkeys(SHARES, 1), "num_train_epochs": math.inf, "learning_rate": math.inf}
UNLISTED = {"azure_ml", "flyte"}
"""Trackers of which transformers does not say whether they are installed."""


@dataclass
class HeadwaterArguments(TrainingArguments):
    """`transformers.TrainingArguments`, every key of it, with these changes.

    Defaults: `learning_rate` 2e-4 on a cosine with 3 % warm-up, `logging_steps` 10; columns are kept, since the
    collator needs them; the loss is watched by headwater, which stops at a non-finite one, so transformers' filter that
    hides it is off; DDP does not broadcast buffers at each step, as ranks change those of an adapter alike, if
    at all. Setting `eval_steps` alone turns evaluation during training on.

    Args:
        loss_normalization: `example` is the mean over the rows of an optimiser step of each row's mean over its
            completion tokens, so that long answers do not outweigh short ones; `token` is the mean over all completion
            tokens of the step, as in transformers and TRL. Both are exact under gradient accumulation and over ranks.
        padding_free: train on batches whose rows follow one another without padding, with attention within each. By
            default on a CPU, where the model can; on a GPU it was not measured.
        overwrite_output_dir: replace the run that `output_dir` holds already, checkpoints included.

    Raises:
        HeadwaterError: if `loss_normalization`, `padding_free` or a log level is none of its values, a number is out of
            range, workers are to be kept and there are none, a tracker of `report_to` is unknown or not installed,
            liger-kernel is asked for and not installed, torch.compile knows no such backend or mode, or a file that a
            key names cannot be read.
        ValueError: from `TrainingArguments`, on settings that exclude each other.
    """

    output_dir: str = field(default="trainer_output", metadata={"help": "Folder of the run."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "Schedule of the rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: steps, or below 1 a share of all steps."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses in logs."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that the model does not name."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Broadcast buffers at each step."})
    loss_normalization: LossNormalization = field(default="example", metadata={"help": "One of example, token."})
    padding_free: bool | None = field(default=None, metadata={"help": "Pack rows; by default on a CPU."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run in output_dir."})

    def __post_init__(self) -> None:
        allowed = get_args(LossNormalization)
        if self.loss_normalization not in allowed:
            raise HeadwaterError(
                Problem(
                    f"loss_normalization is one of {', '.join(allowed)}, not {self.loss_normalization!r}",
                    "training.loss_normalization",
                )
            )
        if not isinstance(self.padding_free, bool | None):
            what = f"padding_free is true or false, not {self.padding_free!r}"
            raise HeadwaterError(Problem(what, "training.padding_free", "leave it out for the default"))
        problems = [
            Problem(f"{name} is at least {least}, not {value:g}", f"training.{name}")
            for name, least in LEAST.items()
            if (value := getattr(self, name)) is not None and not value >= least
        ]
        problems += [
            Problem(f"{name} is {'finite' if top == math.inf else f'below {top}'}, not {value:g}", f"training.{name}")
            for name, top in BELOW.items()
            if (value := getattr(self, name)) >= top
        ]
        if self.max_steps == 0 or self.max_steps < -1:
            fix = "leave it out to go by num_train_epochs"
            problems.append(Problem(f"max_steps is at least 1, not {self.max_steps}", "training.max_steps", fix))
        if self.max_steps < 0 and self.num_train_epochs <= 0:
            what = f"num_train_epochs is above 0, not {self.num_train_epochs:g}"
            problems.append(Problem(what, "training.num_train_epochs"))
        if self.data_seed is not None and not is_seed(self.data_seed):
            problems.append(Problem(f"data_seed should be {RANGE}, not {self.data_seed}", "training.data_seed"))
        for name in ("log_level", "log_level_replica"):
            if (level := getattr(self, name)) not in trainer_log_levels:
                fix = f"one of: {', '.join(trainer_log_levels)}"
                problems.append(Problem(f"unknown {name} {level!r}", f"training.{name}", fix))
        if self.dataloader_persistent_workers and self.dataloader_num_workers == 0:
            what, fix = "there are no workers to keep", "set dataloader_num_workers to 1 or more, or leave the key out"
            problems.append(Problem(what, "training.dataloader_persistent_workers", fix))
        if self.use_liger_kernel and not is_liger_kernel_available():
            what, fix = "liger-kernel 0.3.0 or newer is not installed", "pip install liger-kernel, or leave the key out"
            problems.append(Problem(what, "training.use_liger_kernel", fix))
        if problems:
            raise HeadwaterError(*problems)
        if self.eval_steps and IntervalStrategy(self.eval_strategy) == IntervalStrategy.NO:
            self.eval_strategy = "steps"
        try:
            super().__post_init__()
        except OSError as error:  # of the file that one of the keys names
            named = [f.name for f in fields(self) if error.filename and getattr(self, f.name) == error.filename]
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise HeadwaterError(Problem(what, ".".join(["training", *named[:1]]))) from error
        problems = [problem for name in self.report_to or () if (problem := _without(name)) is not None]
        if self.torch_compile:
            problems += _uncompilable(self.torch_compile_backend, self.torch_compile_mode)
        if problems:
            raise HeadwaterError(*problems)


def steps_per_epoch(args: TrainingArguments, batches: int) -> int:
    """The optimiser steps of an epoch of so many batches a rank."""
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def total_steps(args: TrainingArguments, batches: int) -> int:
    """The optimiser steps of a run whose epochs have so many batches a rank."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_per_epoch(args, batches))


def _without(tracker: str) -> Problem | None:
    """Why a tracker cannot be reported to; None if it can."""
    where = "training.report_to"
    if tracker not in INTEGRATION_TO_CALLBACK:
        fix = f"one of: none, all, {', '.join(INTEGRATION_TO_CALLBACK)}"
        return Problem(f"unknown tracker {tracker!r}", where, fix)
    if tracker in {*get_available_reporting_integrations(), *UNLISTED}:
        return None
    return Problem(f"{tracker} is not installed", where, "install it, or set report_to to none")


def _uncompilable(backend: str | None, mode: str | None) -> list[Problem]:
    """What torch.compile would refuse at the first step."""
    modes = list(torch._inductor.list_mode_options())
    problems = []
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        where, fix = "training.torch_compile_backend", f"one of: {', '.join(torch._dynamo.list_backends())}"
        problems.append(Problem(f"unknown backend {backend!r}", where, fix))
    if mode is not None and mode not in modes:
        problems.append(Problem(f"unknown mode {mode!r}", "training.torch_compile_mode", f"one of: {', '.join(modes)}"))
    return problems
