"""One plain LoRA per task from an adapter that is several: exact by task id, approximate by a task's mean gates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from ..analysis.routing import Texts, encode_whole, mean_gates
from ..data.encode import encode_prompt
from ..errors import HeadwaterError, Problem
from ..evaluation import EvaluationSpec, TaskScore, interval, score_task
from ..evaluation.forward import max_positions, pad_id
from ..evaluation.scoring import sample
from ..methods.base import NotMergeable
from .plain import method_layers, write_plain_lora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.encode import DataSpec
    from ..data.tasks import Task

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Exported:
    """One task's plain LoRA.

    Args:
        rank: of the LoRA.
        exact: it computes for this task what the adapter does.
        rows: rows that its gates are the mean of; 0 where none were needed.
        routed, plain: scores on held-out rows of the adapter and of the plain LoRA; None where none were taken.
    """

    task: str
    rank: int
    exact: bool
    rows: int = 0
    routed: TaskScore | None = None
    plain: TaskScore | None = None

    @property
    def lost(self) -> float | None:
        """How much worse the plain LoRA is; below 0 where it is better."""
        if self.routed is None or self.plain is None:
            return None
        return (self.routed.value - self.plain.value) * (-1 if self.routed.metric == "loss" else 1)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of `lost`, from the differences row by row; None for losses, whose rows weigh differently."""
        if self.routed is None or self.plain is None or self.routed.metric == "loss":
            return None
        differences = [a - b for a, b in zip(self.routed.correct, self.plain.correct, strict=True)]
        return interval(differences, [1.0] * len(differences))


def check_differs_by_task(model: Any) -> None:
    """Refuses an adapter that is one plain LoRA, whatever the task.

    Raises:
        HeadwaterError: if it is.
    """
    try:
        name, layers = method_layers(model)
        for layer in layers:
            layer.branch(name).factors()
    except NotMergeable:
        return
    what = "the adapter is the same LoRA for every task"
    raise HeadwaterError(Problem(what, "--per-task", "leave --per-task out: one plain LoRA is exact"))


def by_task_id(model: Any, adapter: Path, names: Sequence[str], folder: Path) -> list[Exported]:
    """Writes `folder/<task>` for each task, exactly what a task-conditioned adapter does for it.

    Args:
        model: a `PeftModel` with the adapter; its base may be without weights.
        adapter: the folder that the adapter was loaded from.
        names: of the tasks, in the order of their ids.
    """
    return [
        Exported(name, write_plain_lora(model, adapter, folder / name, task=index), exact=True)
        for index, name in enumerate(names)
    ]


def by_mean_gates(
    model: Any,
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    spec: EvaluationSpec,
    data_spec: DataSpec,
    folder: Path,
    *,
    rows: int = 64,
    score_rows: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Exported]:
    """Writes `folder/<task>` with gates averaged over the task's rows, and scores it against the adapter.

    Gates are averaged over all tokens of training rows, or of validation rows where a task has no others; test rows are
    scored and nothing else. Scored is what was written, through stock PEFT.

    Args:
        model: a `PeftModel` with a routed adapter. It is used up: the adapter is taken off its base in the end.
        adapter: the folder that the adapter was loaded from.
        rows: rows per task that gates are averaged over; the same ones every time.
        score_rows: test rows per task that are scored; None takes all, 0 none.

    Raises:
        HeadwaterError: if a task has no rows to average over.
    """
    ranks: dict[str, int] = {}
    counts: dict[str, int] = {}
    for done, task in enumerate(tasks):
        progress("averaging gates", done, len(tasks))
        chosen = sample(task.train or task.validation, rows)
        if not chosen:
            what = "the task has neither training nor validation rows to average gates over"
            raise HeadwaterError(Problem(what, task.name, "add some to the run's file"))
        sequences = [encode_whole(row, tokenizer, data_spec, max_positions(model)) for row in chosen]
        prompts = [len(encode_prompt(row, tokenizer, data_spec)) for row in chosen]
        gates = mean_gates(model, Texts(sequences, prompts), fill=pad_id(tokenizer))
        if not gates:
            raise HeadwaterError(Problem("its rows run through no layer that the adapter is on", task.name))
        # Layers that no text runs through, as those for images or of experts that nothing is sent to, have no gates.
        if without := [layer.name for layer in method_layers(model)[1] if layer.name not in gates]:
            logger.warning("%s: left out, as its rows do not run through them: %s", task.name, ", ".join(without))
        ranks[task.name] = write_plain_lora(model, adapter, folder / task.name, gates=gates, only=gates)
        counts[task.name] = len(chosen)
    progress("averaging gates", len(tasks), len(tasks))

    def scores(scored: Any, task: Task, what: str) -> TaskScore | None:
        held_out = sample(task.test, score_rows) if score_rows != 0 else []
        if not held_out:
            return None

        def show(_: str, done: int, total: int) -> None:
            progress(f"scoring {what}: {task.name}", done, total)

        return score_task(scored, tokenizer, task, held_out, spec, data_spec, progress=show)

    routed = {task.name: scores(model, task, "the adapter") for task in tasks}
    base = model.unload()
    plain: dict[str, TaskScore | None] = {}
    for task in tasks:
        if routed[task.name] is not None:
            alone = PeftModel.from_pretrained(base, str(folder / task.name)).eval()
            plain[task.name] = scores(alone, task, "the plain LoRA")
            base = alone.unload()
    return [Exported(name, rank, False, counts[name], routed[name], plain.get(name)) for name, rank in ranks.items()]
