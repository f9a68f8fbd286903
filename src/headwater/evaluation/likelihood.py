"""Log-probabilities of given continuations, each prompt run once.

A prompt's last hidden state alone goes through the vocabulary head. That is all there is to do for choices of one
token; for longer ones the prompt's keys and values are copied per choice and only the choice's own tokens are run.
Continuations that share a beginning (`" option A"`, `" option B"`) share the run of that beginning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from headwater.evaluation.forward import (
    accepts,
    chunks,
    input_device,
    label_keywords,
    logits_at,
    pad,
    task_keywords,
    vocabulary_size,
)
from headwater.tuner.context import keep_memory

Tokens = Sequence[int]


@dataclass(frozen=True)
class _Run:
    """One sequence to put through the model for a prompt, and which choices are read off it."""

    prompt: int  # index within the batch
    tail: tuple[int, ...]  # what follows the prompt
    choices: tuple[int, ...]  # choices whose tokens but the last are a beginning of `tail`


class _Scores:
    """Collects log-probabilities per prompt and choice."""

    def __init__(self, choices: Sequence[Sequence[Tokens]]):
        self.choices = choices
        self.sums = [[0.0] * len(options) for options in choices]

    def add(self, logits: Tensor, reads: list[tuple[int, int, int, int, int]]) -> None:
        """Add what `reads` names: (row of `logits`, position in it, token, prompt, choice).

        logits: float32 `[b, m, vocabulary]`.
        """
        if not reads:
            return
        row, position, token = torch.tensor([r[:3] for r in reads], device=logits.device).T
        values = logits[row, position, token] - logits.logsumexp(-1)[row, position]
        for (*_, prompt, choice), value in zip(reads, values.tolist(), strict=True):
            self.sums[prompt][choice] += value


def choice_log_probs(
    model: nn.Module,
    prompts: Sequence[Tokens],
    choices: Sequence[Sequence[Tokens]],
    *,
    fill: int,
    task_index: int | None = None,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Sum over each choice's tokens of log p(token | prompt, tokens before it), in nats, in float32.

    Call it inside `evaluating(model)`. The values depend on neither `batch_size` nor the other prompts.

    Args:
        prompts: token ids per prompt, at least one each.
        choices: per prompt its choices as token ids, at least one each.
        fill: the id that padding is made of (masked).
        on_batch: called with the number of prompts done after each batch.
    """
    scores = _Scores(choices)
    cached = accepts(model, "past_key_values", "use_cache", "position_ids")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        runs = [run for i in batch for run in _cover(i, choices[i])]
        with_cache = cached and any(run.tail for run in runs)
        if with_cache:
            with_cache = cached = _score_with_cache(model, prompts, batch, runs, scores, fill, task_index, batch_size)
        if not with_cache:
            _score_whole(model, prompts, runs, scores, fill, task_index, batch_size)
        if on_batch is not None:
            on_batch(len(batch))
    return scores.sums


def _cover(prompt: int, choices: Sequence[Tokens]) -> list[_Run]:
    """The fewest tails after `prompt` that give the logits for all `choices`: no tail is a beginning of another."""
    inputs = [tuple(choice[:-1]) for choice in choices]
    tails: list[tuple[int, ...]] = []
    readers: list[list[int]] = []
    for c in sorted(range(len(choices)), key=lambda c: len(inputs[c]), reverse=True):
        host = next((t for t, tail in enumerate(tails) if tail[: len(inputs[c])] == inputs[c]), None)
        if host is None:
            tails.append(inputs[c])
            readers.append([c])
        else:
            readers[host].append(c)
    return [_Run(prompt, tail, tuple(r)) for tail, r in zip(tails, readers, strict=True)]


def _score_whole(
    model: nn.Module,
    prompts: Sequence[Tokens],
    runs: Sequence[_Run],
    scores: _Scores,
    fill: int,
    task_index: int | None,
    batch_size: int,
) -> None:
    """Each run as one sequence, prompt and tail, padded on the right: nothing is asked of the model but causality."""
    for part in chunks([len(run.tail) + 1 for run in runs], batch_size, vocabulary_size(model)):
        group = [runs[i] for i in part]
        padded = pad([[*prompts[run.prompt], *run.tail] for run in group], fill).to(input_device(model))
        first = torch.tensor([[len(prompts[run.prompt]) - 1] for run in group])
        offset = torch.arange(max(len(run.tail) for run in group) + 1)
        positions = (first + offset).clamp(max=padded.input_ids.shape[1] - 1)
        logits, _ = logits_at(
            model,
            positions,
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            **({"use_cache": False} if accepts(model, "use_cache") else {}),
            **task_keywords(model, task_index, len(group)),
            **label_keywords(model, [[-100] * len(prompts[run.prompt]) + list(run.tail) for run in group]),
        )
        scores.add(logits, list(_reads(group, scores.choices, first_token=0)))


def _score_with_cache(
    model: nn.Module,
    prompts: Sequence[Tokens],
    batch: Sequence[int],
    runs: Sequence[_Run],
    scores: _Scores,
    fill: int,
    task_index: int | None,
    batch_size: int,
) -> bool:
    """The prompts once, then each tail on a copy of its prompt's keys and values. False, and nothing done, if it can't.

    Prompts are padded on the left: sliding windows go by distance in the cache, so no padding may lie between a
    prompt and its tail.
    """
    device = input_device(model)
    padded = pad([prompts[i] for i in batch], fill, left=True).to(device)
    width = padded.input_ids.shape[1]
    logits, output = logits_at(
        model,
        torch.full((len(batch), 1), width - 1),
        input_ids=padded.input_ids,
        attention_mask=padded.attention_mask,
        position_ids=padded.position_ids,
        use_cache=True,
        **task_keywords(model, task_index, len(batch)),
    )
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, DynamicCache) or not can_be_copied(cache):
        return False
    row_of = {i: row for row, i in enumerate(batch)}
    firsts = [(row_of[i], 0, choice[0], i, c) for i in batch for c, choice in enumerate(scores.choices[i])]
    scores.add(logits, firsts)

    tails = sorted((run for run in runs if run.tail), key=lambda run: len(run.tail), reverse=True)
    for part in chunks([len(run.tail) for run in tails], batch_size, vocabulary_size(model)):
        group = [tails[i] for i in part]
        rows = torch.tensor([row_of[run.prompt] for run in group], device=device)
        tail = pad([run.tail for run in group], fill).to(device)
        lengths = padded.attention_mask.sum(1, keepdim=True)
        steps = torch.arange(tail.input_ids.shape[1], device=device)
        logits, _ = logits_at(
            model,
            steps.expand(len(group), -1),
            input_ids=tail.input_ids,
            attention_mask=torch.cat([padded.attention_mask[rows], tail.attention_mask], dim=1),
            position_ids=lengths[rows] + tail.position_ids,
            past_key_values=copied(cache, rows),
            use_cache=True,
            **task_keywords(model, task_index, len(group)),
        )
        scores.add(logits, list(_reads(group, scores.choices, first_token=1)))
    return True


def _reads(
    runs: Sequence[_Run], choices: Sequence[Sequence[Tokens]], *, first_token: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """What to read off the logits of `runs`, whose first position predicts each choice's token number `first_token`."""
    for row, run in enumerate(runs):
        for c in run.choices:
            for position, token in enumerate(choices[run.prompt][c][first_token:]):
                yield row, position, token, run.prompt, c


def can_be_copied(cache: DynamicCache) -> bool:
    """Whether every layer of the cache replaces its tensors when it grows, so that shallow copies stay apart; and there
    is nothing beside the layers, as in a cache that a model brings itself."""
    return type(cache) is DynamicCache and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def copied(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache that holds rows `rows` (int64 `[b]`, repeats allowed) of `cache`, which stays as it is."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    layer: Any
    for layer in other.layers:
        if layer.get_seq_length() > 0:
            layer.batch_select_indices(rows.to(layer.keys.device))  # a model may be spread over devices
    keep_memory(other, rows)
    return other


def completion_losses(
    model: nn.Module,
    input_ids: Sequence[Tokens],
    labels: Sequence[Tokens],
    *,
    fill: int,
    task_index: int | None = None,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[tuple[float, int]]:
    """Per sequence the sum of -log p over its labelled tokens, in nats, and their number.

    Call it inside `evaluating(model)`. A label of -100 is not scored, nor is a sequence's first token, which nothing
    predicts.

    Args:
        input_ids, labels: token ids per sequence, of equal length within a sequence.
    """
    results = [(0.0, 0)] * len(input_ids)
    scored = [[p for p in range(1, len(label)) if label[p] != -100] for label in labels]
    order = sorted(range(len(input_ids)), key=lambda i: len(input_ids[i]), reverse=True)
    for part in chunks([len(scored[i]) for i in order], batch_size, vocabulary_size(model)):
        batch = [order[i] for i in part]
        padded = pad([input_ids[i] for i in batch], fill).to(input_device(model))
        wanted = pad([[p - 1 for p in scored[i]] for i in batch], 0)
        logits, _ = logits_at(
            model,
            wanted.input_ids,
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            **({"use_cache": False} if accepts(model, "use_cache") else {}),
            **task_keywords(model, task_index, len(batch)),
            **label_keywords(model, [labels[i] for i in batch]),
        )
        targets = pad([[labels[i][p] for p in scored[i]] for i in batch], -100).input_ids.to(logits.device)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        # on the CPU, because Apple's GPUs have no float64
        for i, row in zip(batch, losses.view_as(targets).cpu().double().sum(1).tolist(), strict=True):
            results[i] = (row, len(scored[i]))
        if on_batch is not None:
            on_batch(len(batch))
    return results
