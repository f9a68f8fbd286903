"""How well a model answers a few held-out rows, as a number that one training step can move."""

from __future__ import annotations

import math
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
    """The mean log-probability, in nats, of the right answers of a task's validation rows.

    Where a row has choices, the probability of its answer among them; else that of a token of its completion, on
    average. Accuracy itself would hardly ever change within one step.

    Args:
        rows: at most so many rows of a task, always the same ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSpec, rows: int):
        self.tokenizer, self.data, self.rows = tokenizer, data, rows

    def __call__(self, model: nn.Module, task: Task) -> float:
        rows = sample(task.validation, self.rows)
        prompts = [encode_prompt(row, self.tokenizer, self.data) for row in rows]
        options = [row.choices or (row.completion,) for row in rows]
        tokens = [[encode_completion(text, self.tokenizer) for text in texts] for texts in options]
        with evaluating(model):
            sums = choice_log_probs(model, prompts, tokens, fill=pad_id(self.tokenizer), task_index=task.index)
        total = 0.0
        for row, texts, ids, values in zip(rows, options, tokens, sums, strict=True):
            right = texts.index(row.completion)
            if row.choices:
                most = max(values)
                total += values[right] - most - math.log(sum(math.exp(v - most) for v in values))
            else:
                total += values[right] / len(ids[right])
        return total / len(rows)
