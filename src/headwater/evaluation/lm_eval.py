"""The bridge to lm-eval: BBH, MMLU and any task that has a YAML file there, run on an adapted model as it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from torch import Tensor, nn
from tqdm.auto import tqdm

from headwater.errors import HeadwaterError, Problem
from headwater.evaluation.forward import evaluating
from headwater.tuner import needs_task_ids, task_ids
from headwater.tuner.context import LABELS
from headwater.tuner.generation import goes_by_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LmEvalScore:
    """One figure of lm-eval's.

    Args:
        task: the task's or group's name.
        metric: e.g. `acc` or `exact_match`.
        filter: how the answers were read, `none` for as they stand.
        value: in the metric's own unit; accuracies are in [0, 1].
        stderr: standard error over the rows; None where lm-eval gives none.
        n: rows scored; None for a group.
        shots: solved examples put before each question.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int | None
    shots: int


def lm_eval_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    apply_chat_template: bool = False,
    task_index: int | None = None,
) -> list[LmEvalScore]:
    """Runs lm-eval's tasks on a model, whatever adapter it carries.

    Args:
        tasks: names of tasks, groups or tags, or paths of task files.
        include_path: folder with task files of one's own; a task with `dataset_path: json` needs no network.
        num_fewshot: solved examples before each question; None leaves it to the task.
        limit: at most so many rows of each task.
        task_index: for an adapter that goes by task, the id that all rows get.

    Returns:
        One score per task, metric and filter, in lm-eval's order.

    Raises:
        HeadwaterError: lm-eval is not installed, does not know a task or cannot read its data; or the adapter goes by
            task and no `task_index` was given.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        fix = "pip install 'headwater[lm-eval]'"
        raise HeadwaterError(Problem(f"lm-eval is not installed ({error})", "--lm-eval", fix)) from error

    by_task = needs_task_ids(model)
    if by_task and task_index is None:
        fix = "give --task NAME: the trained task that the rows are treated as"
        raise HeadwaterError(Problem("this adapter goes by task, and lm-eval's rows have none", "--task", fix))
    if include_path is not None and not os.path.isdir(include_path):
        raise HeadwaterError(Problem("there is no such folder", f"--include-path {include_path}"))
    # Reading lm-eval's own thousands of task files takes seconds; tasks of one's own are looked for first.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if _unknown(tasks, manager):
        manager = TaskManager(include_path=include_path)
    if unknown := _unknown(tasks, manager):
        fix = "`lm-eval ls tasks` lists lm-eval's own; tasks of your own need --include-path DIR"
        raise HeadwaterError(*(Problem(f"lm-eval knows no task `{name}`", "--lm-eval", fix) for name in unknown))
    ids = task_ids(model, task_index) if by_task else contextlib.nullcontext()
    with evaluating(model), ids:
        kind = HFLM if goes_by_prompt(model) is None else _by_prompt(HFLM)
        lm = kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found: Any = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=apply_chat_template,
                log_samples=False,
            )
        # a data set that cannot be had or read, a template that does not fit
        except (OSError, ValueError, KeyError, DatasetsError, TemplateError) as error:
            # datasets says no more than that an error occurred; what it was is its cause
            reason = " ".join(str((isinstance(error, DatasetsError) and error.__cause__) or error).split())[:400]
            raise HeadwaterError(Problem(f"lm-eval stopped: {reason}", f"--lm-eval {','.join(tasks)}")) from error
    return list(_scores(found))


def _by_prompt(model_class: Any) -> Any:
    """lm-eval's model for a method that goes by the prompt: lm-eval tells a model neither where its answers begin nor
    which tokens are padding, so each text is run by itself, and the model is told."""

    class ByPrompt(model_class):
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
            found = []
            for request in tqdm(requests, disable=disable_tqdm):
                self._answer = len(request[2])
                found += super()._loglikelihood_tokens([request], disable_tqdm=True, override_bs=1)
            return found

        def _model_call(self, inps: Tensor, **_: Any) -> Tensor:
            labels = inps.clone()  # without the answer's last token, which is not run
            labels[:, : inps.shape[1] + 1 - self._answer] = -100
            return self.model(inps, **{LABELS: labels}).logits

    return ByPrompt


def _unknown(tasks: Sequence[str], manager: Any) -> list[str]:
    return [name for name in tasks if not manager.match_tasks([name]) and not os.path.isfile(name)]


def _scores(found: dict[str, Any]) -> list[LmEvalScore]:
    scores = []
    for name, values in {**found["results"], **(found.get("groups") or {})}.items():
        for key, value in values.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{how}")
            rows = found["n-samples"].get(name)
            scores.append(
                LmEvalScore(
                    task=name,
                    metric=metric,
                    filter=how,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    n=rows["effective"] if rows else None,
                    shots=found["n-shot"].get(name) or 0,
                )
            )
    return scores
