"""transformers' Trainer for several tasks at once."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from ..data.collate import Collator
from ..data.mixture import MixtureSpec, check_tasks, shares
from ..data.sampler import MixtureBatchSampler
from ..errors import HeadwaterError, Problem
from ..evaluation.scores import TaskScore, mean_score
from ..methods.call import KEYWORD, LENGTHS
from ..tuner.context import LABELS, Context, has_encoder
from ..tuner.model import context_of, is_adapted
from .accounts import Accounts
from .adapter import load_default
from .arguments import HeadwaterArguments, steps_per_epoch, total_steps
from .folder import last_checkpoint
from .head_monitor import HeadMonitor
from .loss import CompletionCollator, CompletionHead, completion_losses, count_items, narrowed
from .memory import SavedBytes
from .method_callback import MethodCallback
from .no_gradient import NoGradientCallback
from .packed import pack, rows_apart, why_not
from .resume import check_checkpoint
from .write_errors import whole_or_gone

if TYPE_CHECKING:
    from ..data.encode import Encoded

PASS_COST = {"cpu": 64}
"""Positions that take as long as a forward and backward does beside its positions, by device; 2048 elsewhere."""
Evaluator = Callable[[nn.Module, int], dict[str, TaskScore]]
"""Scores the model's tasks; called with the model and the number of steps it was trained."""


class HeadwaterTrainer(Trainer):
    """Trains one adapter on a mixture of tasks.

    Every key of the arguments works as in `transformers.Trainer`, which does the work. New are: batches from a
    `MixtureBatchSampler`, without padding where `args.padding_free` says so; a loss on completions whose logits exist
    only there, normalised exactly over the whole optimiser step (gradient accumulation and ranks included); each task's
    loss in the logs, as `task_loss/<name>`; task ids for methods that take them; a stop at the first non-finite loss or
    gradient; checkpoints that know the mixture.

    Args:
        model: a causal language model; with an adapter, PEFT's wrapped model.
        args: the settings.
        train: task name -> its encoded rows, in the order of the task ids.
        pad_token_id: fills short rows; any id will do, as padding is masked by length.
        mixture: how tasks are mixed.
        weights: task name -> its weight in the mixture; 1 where not given.
        evaluator: scores the tasks when `eval_strategy` says so. Metrics are `eval_<task>` and `eval_mean`, or
            `eval_loss` for the mean over tasks whose metric is the loss.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        HeadwaterError: if the model is an encoder-decoder, no task has rows, or `padding_free` cannot be.
    """

    args: HeadwaterArguments
    model: Any

    def __init__(
        self,
        model: nn.Module,
        args: HeadwaterArguments,
        *,
        train: Mapping[str, Sequence[Encoded]],
        pad_token_id: int,
        mixture: MixtureSpec,
        weights: Mapping[str, float] | None = None,
        digests: Mapping[str, str] | None = None,
        evaluator: Evaluator | None = None,
        **kwargs: Any,
    ):
        if has_encoder(model):
            raise HeadwaterError("headwater trains decoder-only language models; this one is an encoder-decoder")
        check_tasks(train, weights or {})
        self.task_names = list(train)
        self.lengths = [[len(row) for row in rows] for rows in train.values()]
        self.digests = dict(digests or {})
        self.mixture = mixture
        sizes = [len(rows) for rows in train.values()]
        self.shares = shares(sizes, [(weights or {}).get(name, 1.0) for name in train], self.mixture)
        self.evaluator = evaluator
        self.excluded_seconds = 0.0
        if args.n_gpu > 1:
            args._n_gpu = 1  # DataParallel would split a batch away from its loss positions; torchrun uses all devices
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(itertools.chain.from_iterable(train.values())),
            # Trainer insists on a data set once `eval_strategy` is set; the evaluator has the tasks' rows.
            eval_dataset=kwargs.pop("eval_dataset", [] if evaluator else None),
            data_collator=CompletionCollator(Collator(pad_token_id), _pass_cost(args)),
            **kwargs,
        )
        # The loss is divided by the items of the whole optimiser step, so Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.accounts = Accounts(self)
        self.add_callback(self.accounts)
        self.method_callback = MethodCallback()
        self.add_callback(self.method_callback)
        self.add_callback(NoGradientCallback())
        self.head_monitor = HeadMonitor(model)
        self._head: CompletionHead | None = None
        self._parameters: int | None = None
        self.activation_bytes: int | None = None
        self._counting = False
        if args.padding_free:
            self._packs()  # if it cannot be, that is said before anything is scored

    @property
    def _context(self) -> Context | None:
        """Looked up each time: `align` may come after the trainer was made."""
        return context_of(self.model) if is_adapted(self.model) else None

    def _packs(self) -> bool:
        """Whether batches are to be packed.

        Raises:
            HeadwaterError: if the run's settings want it and it cannot be.
        """
        wanted = self.args.padding_free
        if wanted is False or (wanted is None and self.args.device.type != "cpu"):
            return False
        if self._context is not None and self._context.needs_padding:
            reason: str | None = "align.token_mode: per_position compares padded rows"
        elif self.args.torch_compile or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            reason = "it cannot be together with torch_compile, FSDP or DeepSpeed"
        elif self.args.neftune_noise_alpha is not None:
            reason = "neftune_noise_alpha scales its noise by the length of a padded row"
        else:
            reason = why_not(self.model)
        if reason is not None and wanted:
            raise HeadwaterError(Problem(f"this run cannot train on packed rows: {reason}", "training.padding_free"))
        if reason is not None:
            logging.getLogger(__name__).info("rows are padded: %s", reason)
        return reason is None

    def _rows_apart(self, inputs: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        return rows_apart(self.model) if LENGTHS in inputs else contextlib.nullcontext()

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the mixture, split over ranks by accelerate."""
        args = self.args
        collate = CompletionCollator(pack) if self._packs() else self.data_collator
        self.sampler = MixtureBatchSampler(
            self.lengths,
            self.shares,
            self._train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            batching=self.mixture.batching,
            drop_last=args.dataloader_drop_last,
        )
        loader: DataLoader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        prepared = self.accelerator.prepare(loader)
        self.batches_per_epoch = len(prepared)  # of this rank
        return prepared

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As `transformers.Trainer.train`; resuming gives the trajectory of a run that was never stopped.

        Raises:
            HeadwaterError: at a non-finite loss or gradient, naming step and tasks; and if a checkpoint to be resumed
                comes from another mixture or method, or was trained with other settings.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(Path(str(self.args.output_dir))) or True  # which Trainer refuses
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            check_checkpoint(self, Path(resume_from_checkpoint))
            if self._restore_if_complete(resume_from_checkpoint):
                return TrainOutput(self.state.global_step, math.nan, {})
        self._head = CompletionHead(self.model)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._head.remove()
            self._head = None
            self.method_callback.close()

    def _restore_if_complete(self, checkpoint: str) -> bool:
        """Takes the weights of a checkpoint that has all steps, or the best ones: Trainer would add one more step."""
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        if state.global_step < self.total_steps():
            return False
        weights = Path(checkpoint)
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            # beside it, as the folder may have moved; or in that of the run that this one went on from
            best = Path(state.best_model_checkpoint)
            weights = next((p for p in (weights.parent / best.name, best) if p.is_dir()), weights)
        self._load_from_checkpoint(str(weights))
        self.state = state
        self.accounts.restore(state)
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_default(self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with whole_or_gone(folder) if self.args.should_save else contextlib.nullcontext():
            super()._save_checkpoint(model, trial)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """The batches of one optimiser step, and over how many items its loss is the mean."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        counts = [count_items(b["completion_lengths"], per_example=self.per_example).sum() for b in batches]
        items = torch.stack(counts).sum().to(device)
        if self.averages_over_ranks:
            items = self.accelerator.reduce(items, "sum")
        return batches, items

    def realised_shares(self, steps: int) -> dict[str, dict[str, float]]:
        """What the first `steps` optimiser steps drew, counted: task -> rows, tokens and their shares."""
        place = self.accounts.place(steps)
        found = self.sampler.realised_shares(place["epoch"] * len(self.sampler) + place["batches"])
        keys = {"rows": "rows", "row_share": "row_shares", "tokens": "tokens", "token_share": "token_shares"}
        return {name: {key: found[source][i] for key, source in keys.items()} for i, name in enumerate(self.task_names)}

    def total_steps(self) -> int:
        """How many optimiser steps the run has."""
        self.get_train_dataloader()  # which counts the batches
        return total_steps(self.args, self.batches_per_epoch)

    def check_optimizer(self) -> None:
        """Makes optimizer and schedule once, for nothing: transformers reads some of their settings only then.

        Raises:
            HeadwaterError: if they cannot be made.
        """
        steps = self.total_steps()  # out here, as settings that make no batches are no fault of the optimiser's
        where = "training.optim"
        try:
            self.create_optimizer()
            where = "training.lr_scheduler_type"
            schedule = self.create_scheduler(steps)
            for rate in getattr(schedule, "lr_lambdas", ()):  # some settings are read first past the warm-up
                rate(steps - 1)
        except (TypeError, ValueError, ImportError) as error:
            raise HeadwaterError(Problem(str(error), where)) from error
        finally:
            self.optimizer = self.lr_scheduler = None

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.args, self.batches_per_epoch)

    @property
    def per_example(self) -> bool:
        return self.args.loss_normalization == "example"

    @property
    def averages_over_ranks(self) -> bool:
        return self.args.average_tokens_across_devices and self.accelerator.num_processes > 1

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch, in parts where it is `narrowed`; their losses add up to that of the batch.

        It stays whole where they would not: without the items of the optimiser step, or under a loss between rows.
        """
        cut = num_items_in_batch is not None and self.may_cut
        parts = narrowed({key: value for key, value in inputs.items() if cut or key != "cuts"})
        self._counting = self.activation_bytes is None
        losses = []
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model), self._rows_apart(part):
                losses.append(super().training_step(model, part, num_items_in_batch))
        self._counting = False
        return torch.stack(losses).sum()

    @property
    def may_cut(self) -> bool:
        """False under a loss between rows, and where ranks must run as many forwards as each other, or one a batch."""
        context, ranks = self._context, self.accelerator.num_processes
        if context is not None and (context.needs_batch or (ranks > 1 and context.branches_meet_ranks)):
            return False
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This batch's part of the loss of its optimiser step; without `num_items_in_batch`, the batch's own loss.

        Of packed rows, under gradient checkpointing, its backward must run inside `rows_apart(model)`, too.
        """
        inputs = dict(inputs)
        labels, tasks = inputs.pop("labels"), inputs.pop(KEYWORD)
        inputs.pop("cuts", None)
        index, lengths = inputs.pop("completion_index"), inputs.pop("completion_lengths")
        items = count_items(lengths, per_example=self.per_example)
        # In evaluation transformers gives the number of labels, which need not be what the mean is over.
        step = num_items_in_batch if model.training else None
        total = items.sum() if step is None else step
        ranks = self.accelerator.num_processes if self.averages_over_ranks and step is not None else 1
        scale = items.sum() * ranks / total
        context = self._context
        if context is not None:
            # The model is not given the labels, so that it computes no loss; a method may still want to know them.
            inputs |= {KEYWORD: tasks, LABELS: labels}
            context.loss_scale = scale  # type: ignore[assignment]
        head = self._head or CompletionHead(self.model)
        try:
            with head.at(index), self._count_activations(model), self._rows_apart(inputs):
                outputs = model(**inputs)
        finally:
            if context is not None:
                context.loss_scale = 1.0  # what runs the model next may not be this trainer
        if head is not self._head:
            head.remove()
        losses = completion_losses(
            head.rows(outputs.logits, index),
            labels,
            index,
            lengths,
            per_example=self.per_example,
            label_smoothing=self.args.label_smoothing_factor,
        )
        if model.training:
            self.accounts.add(losses.detach(), items, tasks, inputs)
            if context is not None:
                self.accounts.add_auxiliary(context.last_losses, scale)
        # Every rank's gradient is averaged over ranks afterwards, hence times their number.
        loss = losses.sum() * ranks / total
        if context is not None:
            context.follow(loss)
        return (loss, outputs) if return_outputs else loss

    @contextlib.contextmanager
    def _count_activations(self, model: nn.Module) -> Iterator[None]:
        """In the first batch of training, `activation_bytes`: what its forward keeps for backward, parameters left out;
        the most of its parts.

        Not under `torch_compile` or gradient checkpointing, which decide by themselves what is kept.
        """
        args = self.args
        if not self._counting or args.torch_compile or args.gradient_checkpointing:
            yield
            return
        with SavedBytes(model) as saved:
            yield
        self.activation_bytes = max(self.activation_bytes or 0, saved.total)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Scores the tasks with the evaluator; without one, as `transformers.Trainer.evaluate`."""
        started = time.perf_counter()
        try:
            if self.evaluator is None:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            scores = self.evaluator(self.model, self.state.global_step)
        finally:
            self.excluded_seconds += time.perf_counter() - started
        metrics = {f"{metric_key_prefix}_{name}": score.value for name, score in scores.items()}
        losses = [score.value for score in scores.values() if score.metric == "loss"]
        mean = mean_score(scores.values())
        if mean is not None:
            metrics[f"{metric_key_prefix}_mean"] = mean
        if losses:
            metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the training log each task's loss since the last one, tokens per second, how alike heads are and what
        gates did."""
        if "loss" in logs:
            logs.update(self.accounts.close_window())
            logs.update(self.head_monitor.measure())
            if self.method_callback.gates is not None:
                logs.update(self.method_callback.gates.close_window())
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers' estimate, with the parameters counted once instead of at each step."""
        if self._parameters is None:
            self._parameters = super().floating_point_ops({"input_ids": torch.zeros(1)})
        return self._parameters * inputs["input_ids"].numel()


def _pass_cost(args: HeadwaterArguments) -> int | None:
    """`CompletionCollator.pass_cost`; None for a compiled model, which would be compiled for every width."""
    return None if args.torch_compile else PASS_COST.get(args.device.type, 2048)
