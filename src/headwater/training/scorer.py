"""Scores the tasks of a run: all rows before and after training, some of them during it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from torch import nn
from transformers import TrainerCallback

from ..data.encode import DataSpec
from ..data.tasks import Task
from ..evaluation.scores import TaskScore
from ..evaluation.scoring import score_tasks
from ..evaluation.spec import EvaluationSpec
from .history import History
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Scorer:
    """Scores tasks, shows the scores and writes them down.

    Args:
        history: where each evaluation is written; None on all ranks but the first.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tasks: list[Task],
        spec: EvaluationSpec,
        data_spec: DataSpec,
        history: History | None,
        display: ProgressDisplay,
    ):
        self.tokenizer = tokenizer
        self.tasks = tasks
        self.spec = spec
        self.data_spec = data_spec
        self.history = history
        self.display = display

    def all_rows(self, model: nn.Module, step: int) -> dict[str, TaskScore]:
        """Scores every task on all of its test rows."""
        return self._score(model, step, {"test": self.tasks}, None)

    def during(self, model: nn.Module, step: int) -> dict[str, TaskScore]:
        """Scores every task on some of its validation rows, or of its test rows where it has no others."""
        splits = {
            "validation": [task for task in self.tasks if task.validation],
            "test": [task for task in self.tasks if not task.validation],
        }
        return self._score(model, step, splits, self.spec.max_rows_during_training)

    def _score(
        self, model: nn.Module, step: int, splits: dict[str, list[Task]], max_rows: int | None
    ) -> dict[str, TaskScore]:
        state = PartialState()
        # Ranks that hold the whole model share the tasks out; where it is sharded they must all run the same forwards.
        whole = state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        mine = slice(state.process_index, None, state.num_processes) if whole else slice(None)
        found: dict[str, TaskScore] = {}
        for split, tasks in splits.items():
            found |= score_tasks(
                model,
                self.tokenizer,
                tasks[mine],
                self.spec,
                self.data_spec,
                split=split,
                max_rows=max_rows,
                progress=self.display.scoring,
            )
        if whole:
            found = dict(gather_object(list(found.items())))
        scores = {task.name: found[task.name] for task in self.tasks if task.name in found}
        if self.history is not None:
            self.history.append_scores(step, scores)
        self.display.scored(scores, step)
        return scores


class NotTwiceAtTheEnd(TrainerCallback):
    """No evaluation after the last step, as all rows are scored next; unless the choice of the best model needs it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.metric_for_best_model is None:
            control.should_evaluate = False
