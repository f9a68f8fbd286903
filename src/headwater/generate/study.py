"""Collect, train, generate and score: does a generated adapter do what the trained one does?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor, nn

from ..base_model import load_base_model
from ..data.tasks import Task, load_tasks
from ..errors import HeadwaterError, Problem
from ..evaluation.scores import TaskScore
from ..evaluation.scoring import check_rows, score_tasks
from ..files import write_json, write_text
from ..methods.files import write_tensors
from ..training.adapter import add_adapter
from ..training.folder import ELSEWHERE, check_writable, held_in, lock_folder, named
from ..training.run import require_one_process
from .collect import collect, collected, mean_of, with_adapter
from .fit import check_batches, check_state, fit, new_generator
from .generator import AdapterGenerator
from .layout import Layout, write_adapter
from .task_vector import task_vector

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .spec import MetaConfig


WHOLE = "generator"
"""What the generator of all tasks is called, its folder as well."""


class MetaRun:
    """One `headwater meta` file on its way: the base model, the tasks, and what each step leaves in `output_dir`."""

    def __init__(self, config: MetaConfig, console: Console):
        require_one_process("headwater meta")
        self.config, self.console = config, console
        self.folder = Path(config.output_dir)
        _check_folder(self.folder, config.where("output_dir"))
        self.tasks = load_tasks(config.tasks, config.base_dir)
        self.model: nn.Module
        self.tokenizer: PreTrainedTokenizerBase
        self.model, self.tokenizer = load_base_model(config.model_name_or_path, **config.model.model_dump())

    def collect(self) -> None:
        """Trains each task by itself and keeps its late checkpoints; notes the tasks' vectors."""
        self._check_batches()
        with lock_folder(self.folder):
            self._collect()

    def _collect(self) -> None:
        from ..config import dump_config

        collect(self.config, self.model, self.tokenizer, self.tasks, console=self.console)
        write_text(self.folder / "config.yaml", dump_config(self.config))  # what was collected is of this config
        # Training moves the model, but only where something was left to collect; scores are of one device all the same.
        if self.config.model.device_map is None and self.model.device != self.config.device:
            self.model.to(self.config.device)
        vectors = {task.name: self.vector(task) for task in self.tasks}
        write_tensors(vectors, self.folder / "task_vectors.safetensors", {})

    def _check_batches(self) -> None:
        """Refuses what no generator could be trained on, before hours of collecting."""
        adapted = add_adapter(self.model, self.config.method)
        length = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        self.model = adapted.unload()  # type: ignore[operator]
        tasks = len(self.tasks) - self.config.meta.leave_one_out
        check_batches(length, tasks, self.config.meta, self.config.where("meta", "rows_per_task"))

    def vector(self, task: Task) -> Tensor:
        """A task's vector from its training rows."""
        settings = self.config.meta.task_vector.model_dump()
        return task_vector(self.model, self.tokenizer, task.train, self.config.data, **settings)

    def train(self) -> dict[str, Any]:
        """Collects what is missing, trains the generator, scores what it writes; returns `results.json`."""
        self._check_batches()
        check_rows(self.model, self.tokenizer, self.tasks, self.config.evaluation, self.config.data)
        with lock_folder(self.folder):
            for what in self._generators():
                check_state(self._state(what), self.config.meta, self.config.seed)
            return self._train()

    def _train(self) -> dict[str, Any]:
        self._collect()
        names = [task.name for task in self.tasks]
        layout, weights = collected(self.folder / "collect", names)
        vectors = load_file(self.folder / "task_vectors.safetensors")
        generator = self._fit(WHOLE, layout, weights, vectors)
        generator.save(self.folder / WHOLE)
        generated = {name: generator.for_task(name) for name in names}
        adapters = {
            "source": {name: weights[name][-1] for name in names},
            "mean_checkpoint": {name: mean_of(weights, name) for name in names},
            "generated": generated,
            # what the generator may have learned by heart
            "nearest_checkpoint": {name: _nearest(generator, weights, generated[name], name) for name in names},
            # the next task's vector under the task's own scale, so that nothing but the condition is wrong
            "wrong_condition": {
                name: generator.generate(vectors[names[(i + 1) % len(names)]], scale=name)
                for i, name in enumerate(names)
            },
        }
        if self.config.meta.leave_one_out:
            adapters["left_out"] = {name: self._left_out(name, layout, weights, vectors) for name in names}
        scores = {"base": self._score(self.model, self.tasks)}
        for kind, by_task in adapters.items():
            scores[kind] = self._score_adapters(kind, layout, by_task)
        results = self._results(generator, weights, generated, scores)
        write_json(self.folder / "results.json", results)
        return results

    def _left_out(
        self, name: str, layout: Layout, weights: Mapping[str, Tensor], vectors: Mapping[str, Tensor]
    ) -> Tensor:
        others = {task: w for task, w in weights.items() if task != name}
        generator = self._fit(_without(name), layout, others, vectors)
        return generator.generate(vectors[name])

    def _generators(self) -> list[str]:
        """What `_fit` calls the generators that this run trains."""
        return [WHOLE, *(_without(task.name) for task in self.tasks if self.config.meta.leave_one_out)]

    def _state(self, what: str) -> Path:
        return self.folder / "state" / what.replace(" ", "-")

    def _fit(
        self, what: str, layout: Layout, weights: Mapping[str, Tensor], vectors: Mapping[str, Tensor]
    ) -> AdapterGenerator:
        meta, seed = self.config.meta, self.config.seed
        generator = new_generator(layout, weights, vectors, meta, seed)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as progress:
            bar = progress.add_task(what, total=meta.steps, note="")

            def report(step: int, values: dict[str, float]) -> None:
                note = f"error {values['error']:.3f}, KL {values['kl']:.2f}"
                progress.update(bar, completed=step, note=note)

            fit(generator, weights, meta, seed, state=self._state(what), report=report)
        return generator

    def _score_adapters(self, kind: str, layout: Layout, by_task: Mapping[str, Tensor]) -> dict[str, TaskScore]:
        found: dict[str, TaskScore] = {}
        for task in self.tasks:
            folder = self.folder / "adapters" / kind / task.name
            write_adapter(folder, layout, by_task[task.name])
            adapted = with_adapter(self.model, folder)
            try:
                found |= self._score(adapted, [task])
            finally:
                self.model = adapted.unload()
        return found

    def _score(self, model: nn.Module, tasks: list[Task]) -> dict[str, TaskScore]:
        return score_tasks(model, self.tokenizer, tasks, self.config.evaluation, self.config.data)

    def _results(
        self,
        generator: AdapterGenerator,
        weights: Mapping[str, Tensor],
        generated: Mapping[str, Tensor],
        scores: Mapping[str, Mapping[str, TaskScore]],
    ) -> dict[str, Any]:
        names = [task.name for task in self.tasks]
        sizes = generator.sizes()
        kept = sum(w.shape[0] for w in weights.values())
        total = sizes["model"] + sizes["tasks"] + sizes["origin"]
        return {
            "schema": 1,
            "base_model": self.config.model_name_or_path,
            "seed": self.config.seed,
            "scores": {name: {kind: scores[kind][name].value for kind in scores} for name in names},
            "extra": {
                "n": {name: scores["base"][name].n for name in names},
                "metrics": {name: scores["base"][name].metric for name in names},
                "intervals": {
                    name: {kind: scores[kind][name].detail.get("interval") for kind in scores} for name in names
                },
                "majority": {name: scores["base"][name].majority for name in names},
                "distance": _distances(generator, weights, generated),
                "storage_bytes": {
                    **sizes,
                    "generator": total,
                    "one_adapter_per_task": sizes["adapter"] * len(names),
                    "all_checkpoints": sizes["adapter"] * kept,
                    "tasks_to_break_even": total / sizes["adapter"],
                },
            },
        }


def _without(task: str) -> str:
    return f"{WHOLE} without {task}"


def _check_folder(folder: Path, where: str) -> None:
    """Refuses a folder that cannot be written to, or holds another command's run; this command's is gone on with."""
    check_writable(folder, where)
    found = held_in(folder)
    own = [path for path in found if path.name == WHOLE or path.parent != folder]  # or a task that is collected
    if own:
        own.append(folder / "results.json")
    if others := [path for path in found if path not in own]:
        what = f"{folder} holds a run of another command ({named(others, folder)})"
        raise HeadwaterError(Problem(what, where, ELSEWHERE))


def _nearest(generator: AdapterGenerator, weights: Mapping[str, Tensor], vector: Tensor, name: str) -> Tensor:
    """The collected adapter, of any task, that a generated one is nearest to, in weights normalised as the task's."""
    found = generator.normalise(vector, name)
    checkpoints = [checkpoint for of_task in weights.values() for checkpoint in of_task]
    return min(checkpoints, key=lambda one: float((generator.normalise(one, name) - found).square().mean()))


def _distances(
    generator: AdapterGenerator, weights: Mapping[str, Tensor], generated: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Mean squared distance, in normalised weights, of a generated adapter from each task's mean checkpoint."""
    return {
        name: {
            other: torch.nn.functional.mse_loss(
                generator.normalise(vector, name), generator.normalise(mean_of(weights, other), name)
            ).item()
            for other in weights
        }
        for name, vector in generated.items()
    }
