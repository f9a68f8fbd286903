"""What a model is asked for a score: prompts and choices as token ids, or why it cannot be."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import nn

from headwater.data.answers import number_after_mark
from headwater.data.encode import DataSpec, encode_completion, encode_end, encode_prompt, start_ids
from headwater.data.rows import one_screen
from headwater.errors import HeadwaterError, Problem
from headwater.evaluation.forward import max_positions
from headwater.evaluation.generate import length_problems
from headwater.evaluation.spec import EvaluationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwater.data.rows import Row
    from headwater.data.tasks import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """The rows of a task that a model is to be scored on, and how."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    rows: Sequence[Row]
    spec: EvaluationSpec
    data_spec: DataSpec


def choice_ids(asked: Asked) -> tuple[list[list[int]], list[list[list[int]]], dict[str, Any]]:
    """Each row's prompt and choices as token ids, and what a score's detail has to say about them."""
    task, rows, tokenizer = asked.task, asked.rows, asked.tokenizer
    texts = dict.fromkeys(choice for row in rows for choice in row.choices)
    tokens = {text: encode_completion(text, tokenizer) for text in texts}
    problems = [
        Problem(
            "the task is scored by its choices, and this row has none",
            row.where,
            "Add choices, or name another metric.",
        )
        for row in rows
        if not row.choices
    ]
    problems += [Problem(f"the choice {text!r} has no tokens", task.name) for text, ids in tokens.items() if not ids]
    choices = [[tokens[c] for c in row.choices] for row in rows]
    # The shorter of " 1" and " 10" is the likelier by its tokens, whatever the model; where each ends tells them apart.
    nested = {found: _one_begins_another([tokens[c] for c in found]) for found in {row.choices for row in rows}}
    ended = [i for i, row in enumerate(rows) if nested[row.choices]]
    for i in ended:
        end = encode_end(rows[i], tokenizer, asked.data_spec)
        choices[i] = [[*ids, *end] for ids in choices[i]]
    rooms = [max(map(len, found), default=0) for found in choices]
    prompts, cut = _prompts(asked, rooms)
    places = [row.where for row in rows]
    refuse(task, problems + length_problems(asked.model, prompts, places, rooms, "Shorten the prompt."))
    return prompts, choices, {**({"end_scored": len(ended)} if ended else {}), **cut}


def _one_begins_another(choices: Sequence[Sequence[int]]) -> bool:
    ordered = sorted(map(tuple, choices))  # what begins another stands before it, and before what begins alike
    return any(a != b and b[: len(a)] == a for a, b in pairwise(ordered))


def generation_ids(asked: Asked) -> tuple[list[list[int]], dict[str, int]]:
    """Prompts as token ids, and what a score's detail has to say about them."""
    task, rows, problems = asked.task, asked.rows, []
    if task.metric == "final_number":
        problems += [
            Problem("the answer holds no number after ####", row.where, "Add one, or name another metric.")
            for row in rows
            if number_after_mark(row.completion) is None
        ]
    rooms = [asked.spec.max_new_tokens] * len(rows)
    prompts, cut = _prompts(asked, rooms)
    places, fix = [row.where for row in rows], "Shorten the prompt, or lower evaluation.max_new_tokens."
    refuse(task, problems + length_problems(asked.model, prompts, places, rooms, fix))
    return prompts, cut


def _prompts(asked: Asked, rooms: Sequence[int]) -> tuple[list[list[int]], dict[str, int]]:
    """Prompts as token ids, and what a score's detail has to say about them.

    Where training cuts long prompts from the left, so does scoring, to what the row's completion leaves of the length,
    and further where the model's context does not leave `rooms` tokens for the answers. Else they stay whole, since a
    prompt that does not fit into a training batch may well fit into the model.
    """
    rows, tokenizer, data_spec = asked.rows, asked.tokenizer, asked.data_spec
    prompts = [encode_prompt(row, tokenizer, data_spec) for row in rows]
    if data_spec.on_too_long != "truncate_prompt":
        return prompts, {}
    cut, begin = 0, start_ids(tokenizer)
    positions = max_positions(asked.model) or sys.maxsize
    for i, (row, prompt, room) in enumerate(zip(rows, prompts, rooms, strict=True)):
        behind = len(encode_completion(row.completion, tokenizer)) + len(encode_end(row, tokenizer, data_spec))
        excess = len(prompt) + max(behind - min(data_spec.max_length, positions), room - positions)
        start = len(begin) if prompt[: len(begin)] == begin else 0
        if 0 < excess < len(prompt) - start:
            prompts[i] = prompt[:start] + prompt[start + excess :]
            cut += 1
    if cut:
        logger.warning("%s: %d prompts of %d were shortened from the left", rows[0].source, cut, len(rows))
    return prompts, {"shortened_prompts": cut}


def refuse(task: Task, problems: Sequence[Problem]) -> None:
    if problems:
        raise HeadwaterError(*one_screen({task.name: problems}))
