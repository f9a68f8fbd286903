"""The generator's training set: each task trained by itself from one common start, its last checkpoints kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ..data.encode import Encoded, encode_rows
from ..data.mixture import MixtureSpec
from ..data.tasks import Task
from ..errors import HeadwaterError, Problem
from ..evaluation.forward import max_positions, pad_id
from ..files import whole_folder, write_json
from ..training.adapter import add_adapter
from ..training.progress import ProgressDisplay
from ..training.resume import digest
from ..training.run import training_arguments
from ..training.trainer import HeadwaterTrainer
from .layout import Layout, read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .spec import MetaConfig

DONE = "collected.json"


class CollectAdapters(TrainerCallback):
    """Keeps the adapter of the last `checkpoints` steps, `every` so many, as PEFT folders `step-<n>`.

    Works in any transformers Trainer: `Trainer(..., callbacks=[CollectAdapters(folder, checkpoints=20)])`. Start every
    task's training from the same initial adapter, by the same seed: of two starts, `B A` may agree where no `A` does.

    Args:
        folder: where to.
        checkpoints: how many are kept.
        every: steps between them.
    """

    def __init__(self, folder: str | Path, *, checkpoints: int = 20, every: int = 1):
        self.folder, self.checkpoints, self.every = Path(folder), checkpoints, every

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        left, off = divmod(state.max_steps - state.global_step, self.every)
        if off == 0 and 0 <= left < self.checkpoints and state.is_world_process_zero:
            with whole_folder(self.folder / f"step-{state.global_step:06d}") as work:
                model.save_pretrained(work)


def collect(
    config: MetaConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task],
    *,
    console: Console,
) -> None:
    """Trains what is not trained yet: one plain LoRA per task, from one common start.

    Args:
        model: the base model; afterwards it is as it was.

    Raises:
        HeadwaterError: the folder was collected under other settings; rows or settings that training refuses.
    """
    root = Path(config.output_dir) / "collect"
    limit = max_positions(model)
    # of all tasks, before one is trained; each is the only task of its training
    encoded = {task.name: encode_rows(task.train, tokenizer, config.data, 0, limit)[0] for task in tasks}
    settings = {task.name: {**_settings(config), "rows": digest(task.train)} for task in tasks}
    held = {task.name: _held(root / task.name) for task in tasks}
    problems = []
    for name, kept in held.items():
        now = settings[name]
        if kept is not None and kept != now:
            changed = ", ".join(sorted(key for key in {*kept, *now} if kept.get(key) != now.get(key)))
            what = f"the adapters of {name} were collected under other settings: {changed} differ"
            problems.append(Problem(what, str(root / name), "choose another output_dir, or delete this folder"))
    if problems:
        raise HeadwaterError(*problems)
    for task in tasks:
        folder = root / task.name
        if held[task.name] is not None:
            console.print(f"task {task.name}: collected already", highlight=False, style="dim")
            continue
        _collect_task(config, model, pad_id(tokenizer), task.name, encoded[task.name], folder, console)
        write_json(folder / DONE, settings[task.name])


def _collect_task(
    config: MetaConfig,
    model: nn.Module,
    pad_token_id: int,
    task: str,
    encoded: list[Encoded],
    folder: Path,
    console: Console,
) -> None:
    args = training_arguments(config)
    args.save_strategy, args.eval_strategy = "no", "no"
    set_seed(config.seed)  # the same for every task: one start, one gauge
    adapted = add_adapter(model, config.method)
    display = ProgressDisplay(console)
    console.print(f"task {task}: {len(encoded):,} training rows, {args.max_steps} steps", highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    for step in folder.glob("step-*"):  # of a run that was stopped, whose steps may have been others
        shutil.rmtree(step)
    try:
        HeadwaterTrainer(
            adapted,
            args,
            train={task: encoded},
            pad_token_id=pad_token_id,
            mixture=MixtureSpec(),
            callbacks=[
                CollectAdapters(folder, checkpoints=config.meta.checkpoints, every=config.meta.every),
                display,
            ],
        ).train()
    finally:
        display.close()
        adapted.unload()  # type: ignore[operator]


def _settings(config: MetaConfig) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    keys = ("model_name_or_path", "model", "method", "training", "data", "tasks", "seed")
    return {**{key: data[key] for key in keys}, "checkpoints": config.meta.checkpoints, "every": config.meta.every}


def _held(folder: Path) -> dict[str, Any] | None:
    file = folder / DONE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def collected(folder: Path, tasks: list[str]) -> tuple[Layout, dict[str, Tensor]]:
    """The collected adapters: their layout, and per task its checkpoints `(n, L)` in the order of their steps.

    Args:
        folder: holds a folder per task, and that a PEFT folder per checkpoint.

    Raises:
        HeadwaterError: a task has none, or an adapter cannot be read or is of another layout.
    """
    first: Layout | None = None
    weights: dict[str, Tensor] = {}
    problems: list[Problem] = []
    for task in tasks:
        vectors = []
        for path in sorted((folder / task).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-"))):
            layout, vector = read_adapter(path)
            first = first or layout
            first.require_same(layout, str(path))
            vectors.append(vector)
        if vectors:
            weights[task] = torch.stack(vectors)
        else:
            what = f"no adapters were collected for task {task}"
            problems.append(Problem(what, str(folder / task), "headwater meta collect FILE"))
    if problems or first is None:
        raise HeadwaterError(*problems)
    return first, weights


def with_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """The base model with an adapter from a folder; `unload()` takes it off again."""
    return PeftModel.from_pretrained(model, str(folder)).eval()


def mean_of(weights: Mapping[str, Tensor], task: str) -> Tensor:
    """The mean of a task's collected adapters, `(L,)`: what a generator has to beat."""
    return weights[task].mean(0)
