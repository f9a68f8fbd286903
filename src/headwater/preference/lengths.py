"""Whether rows fit into the model, which is asked before a folder is replaced and hours are spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from headwater.data.encode import encode_completion, encode_prompt
from headwater.data.rows import Row, one_screen
from headwater.data.tasks import Task
from headwater.errors import HeadwaterError
from headwater.evaluation.generate import length_problems
from headwater.evaluation.scoring import check_rows, sample
from headwater.preference.spec import BEST_SINGLE, PreferConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_lengths(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], config: PreferConfig
) -> None:
    """Refuses prompts that leave no room for responses, and rows that could not be scored.

    Raises:
        HeadwaterError: naming them, at most about a screen.
    """
    spec = config.preference

    def refuse(rows: Mapping[str, Sequence[Row]], room: Callable[[Row], int], fix: str) -> None:
        problems = {
            name: length_problems(
                model,
                [encode_prompt(row, tokenizer, config.data) for row in some],
                [row.where for row in some],
                [room(row) for row in some],
                fix,
            )
            for name, some in rows.items()
        }
        if wrong := one_screen(problems):
            raise HeadwaterError(*wrong)

    fix = "shorten the prompt, or lower preference.max_new_tokens"
    refuse({task.name: task.train for task in tasks}, lambda _: spec.max_new_tokens, fix)
    if spec.bandit_reward == "validation":
        looked_at = {task.name: sample(task.validation, spec.validation_rows) for task in tasks}
        refuse(looked_at, lambda row: len(encode_completion(row.completion, tokenizer)), "shorten the prompt")
    for split in ("test", *(["validation"] if BEST_SINGLE in spec.strategies else [])):
        check_rows(model, tokenizer, tasks, config.evaluation, config.data, split=split)
