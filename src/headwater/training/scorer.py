"""Scores the tasks of a run: all rows before and after training, some of them during it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from torch import nn
from transformers import TrainerCallback

from ..data.collate import Collator
from ..data.encode import DataSpec, Encoded
from ..data.tasks import Task
from ..evaluation.forward import evaluating, input_device
from ..evaluation.scores import TaskScore
from ..evaluation.scoring import check_rows, score_tasks
from ..evaluation.spec import EvaluationSpec
from ..tuner import needs_task_ids
from ..tuner.context import KEYWORD
from .history import History
from .progress import ProgressDisplay
from .resume import digest

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
        self.rows = {task.name: digest(task.test) for task in tasks if task.test}

    def check(self, model: nn.Module, *, during: bool) -> None:
        """Refuses rows that could not be scored.

        Args:
            during: whether tasks are scored during training, too.
        """
        asked: list[tuple[str, list[Task], int | None]] = [("test", self.tasks, None)]
        if during:  # a few of the rows may be such as cannot be scored though all of them can
            most = self.spec.max_rows_during_training
            asked += [(split, tasks, most) for split, tasks in self._splits_during().items()]
        for split, tasks, rows in asked:
            check_rows(model, self.tokenizer, tasks, self.spec, self.data_spec, split=split, max_rows=rows)

    def all_rows(self, model: nn.Module, step: int) -> dict[str, TaskScore]:
        """Scores every task on all of its test rows."""
        return self._score(model, step, {"test": self.tasks}, None)

    def during(self, model: nn.Module, step: int) -> dict[str, TaskScore]:
        """Scores every task on some of its validation rows, or of its test rows where it has no others."""
        return self._score(model, step, self._splits_during(), self.spec.max_rows_during_training)

    def _splits_during(self) -> dict[str, list[Task]]:
        return {
            "validation": [task for task in self.tasks if task.validation],
            "test": [task for task in self.tasks if not task.validation],
        }

    def known(self, scores: Mapping[str, TaskScore], step: int, *, whole: bool = True) -> dict[str, TaskScore]:
        """Takes scores that are known already, of all test rows or not; shows them and writes them down as if they had
        just been found."""
        scores = {task.name: scores[task.name] for task in self.tasks if task.name in scores}
        if self.history is not None:
            self.history.append_scores(step, scores, self.rows if whole else {})
        self.display.scored(scores, step)
        return scores

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
        return self.known(found, step, whole=max_rows is None)


def changes_nothing(model: Any, encoded: Mapping[str, Sequence[Encoded]], pad_token_id: int) -> bool:
    """Whether an adapter leaves the base model's logits as they are, on each task's shortest training row.

    Differences up to 1e-4 of the largest logit are rounding: a start that is compensated cancels no further. A
    start that differs, such as R-LoRA's with a random router, is beyond them.
    """
    batch = Collator(pad_token_id)([min(rows, key=len) for rows in encoded.values() if rows])
    inputs = {key: batch[key].to(input_device(model)) for key in ("input_ids", "attention_mask")}
    ids = {KEYWORD: batch[KEYWORD].to(input_device(model))} if needs_task_ids(model) else {}
    with evaluating(model):
        adapted = model(**inputs, **ids).logits.float()
        with model.disable_adapter():
            base = model(**inputs, **ids).logits.float()
    real = inputs["attention_mask"].bool()
    return bool((adapted - base)[real].abs().max() <= 1e-4 * base[real].abs().max())


class NotTwiceAtTheEnd(TrainerCallback):
    """No evaluation after the last step, as all rows are scored next; unless the choice of the best model needs it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.metric_for_best_model is None:
            control.should_evaluate = False

    on_epoch_end = on_step_end  # `eval_strategy: epoch` asks there, after the last step's own turn
