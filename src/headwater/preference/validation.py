"""How well a model answers a few held-out rows, as a number that one training step can move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from headwater.data.encode import DataSpec, encode_completion, encode_prompt
from headwater.data.tasks import Task
from headwater.evaluation.forward import evaluating, pad_id
from headwater.evaluation.likelihood import choice_log_probs
from headwater.evaluation.scoring import sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Validation:
    """The mean log-probability, in nats, of a token of the right answers of a task's validation rows.

    Of all that the model could say, not among a row's choices alone: a source that rewards words which are no choice
    at all takes probability from every choice alike, and would go unnoticed. Accuracy would hardly ever change within
    one step.

    Args:
        rows: at most so many rows of a task, always the same ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSpec, rows: int):
        self.tokenizer, self.data, self.rows = tokenizer, data, rows

    def __call__(self, model: nn.Module, task: Task) -> float:
        rows = sample(task.validation, self.rows)
        prompts = [encode_prompt(row, self.tokenizer, self.data) for row in rows]
        answers = [encode_completion(row.completion, self.tokenizer) for row in rows]
        with evaluating(model):
            sums = choice_log_probs(
                model, prompts, [[ids] for ids in answers], fill=pad_id(self.tokenizer), task_index=task.index
            )
        return sum(total / len(ids) for (total,), ids in zip(sums, answers, strict=True)) / len(rows)
