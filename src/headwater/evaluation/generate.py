"""Generate answers in batches, each cut where it ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from headwater.data.encode import DataSpec, closing_ids, encode_prompt
from headwater.data.rows import Row
from headwater.errors import HeadwaterError, Problem
from headwater.evaluation.forward import (
    Padded,
    accepts,
    base_of,
    evaluating,
    input_device,
    logits_at,
    max_positions,
    pad,
    pad_id,
    task_keywords,
)
from headwater.evaluation.likelihood import can_be_copied, copied
from headwater.seeds import RANGE, is_seed
from headwater.tuner import needs_task_ids
from headwater.tuner.generation import goes_by_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

NEW_TOKENS = 256
"""Most tokens of an answer, unless its caller says how many."""
COLDEST = 1e-20
"""Logits divided by less could be infinite in float32; at this the likeliest token is drawn already."""


@dataclass(frozen=True)
class Generated:
    """One generated answer: its text, and whether it came to an end of its own before the token limit."""

    text: str
    finished: bool


class _Settled(StoppingCriteria):
    """Ends a row as soon as `settled(prompt index, text so far)` holds; transformers pads it from there on."""

    def __init__(self, tokenizer: Any, settled: Callable[[int, str], bool], batch: Sequence[int], width: int):
        self.tokenizer, self.settled, self.batch, self.width = tokenizer, settled, batch, width
        self.rows: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        new = input_ids[:, self.width :]
        for row, tokens in enumerate(new.tolist()):
            if row not in self.rows and self.settled(self.batch[row], decode(self.tokenizer, tokens)):
                self.rows.add(row)
        return torch.tensor([row in self.rows for row in range(len(new))], device=input_ids.device)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of generated tokens, without special tokens, spaces as they are."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def end_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's eos or what closes a turn in its chat template, one of which training
    puts there, and those of the model's own settings."""
    settings = getattr(base_of(model), "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return sorted({i for i in (tokenizer.eos_token_id, *listed, *closing_ids(tokenizer)) if i is not None})


def generate_from_ids(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    task_index: int | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    batch_size: int = 16,
    settled: Callable[[int, str], bool] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Continue token ids, padded on the left; the model's own sampling settings and penalties are not used.

    Call it inside `evaluating(model)`.

    Args:
        prompts: token ids, at least one per prompt.
        temperature: 0 takes the likeliest token each time; else tokens are sampled.
        samples: continuations of each prompt, which come next to each other in the result. The prompt is run once
            where the model and the method allow it.
        batch_size: prompts in a batch.
        settled: ends prompt `i` early once `settled(i, its text so far)` holds.
        on_batch: called with the number of prompts done after each batch.
    """
    ends = end_ids(model, tokenizer)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": max(temperature, COLDEST), "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        **sampling,
        max_new_tokens=max_new_tokens,
        min_length=0,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=pad_id(tokenizer),
        return_dict_in_generate=False,
    )
    at_once = samples > 1 and accepts(model, "past_key_values", "use_cache", "position_ids")
    at_once = at_once and goes_by_prompt(model) is None  # what is read once lacks the prompt's last token
    results = [Generated("", False)] * (len(prompts) * samples)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        padded = pad([prompts[i] for i in chosen], pad_id(tokenizer), left=True).to(input_device(model))
        width = padded.input_ids.shape[1]
        cache = None
        if at_once and width > 1:
            cache = _run_prompts(model, padded, samples, task_index)
        batch = [i for i in chosen for _ in range(samples)]
        stop = _Settled(tokenizer, settled or (lambda _i, _text: False), batch, width)
        with _without_own_settings(model):
            output = cast(Any, model).generate(
                input_ids=padded.input_ids.repeat_interleave(samples, 0),
                attention_mask=padded.attention_mask.repeat_interleave(samples, 0),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([stop] if settled else []),
                **({} if cache is None else {"past_key_values": cache}),
                **task_keywords(model, task_index, len(batch)),
            )
        for row, tokens in enumerate(output[:, width:].tolist()):
            end = next((at for at, token in enumerate(tokens) if token in ends), None)
            finished = end is not None or row in stop.rows
            results[batch[row] * samples + row % samples] = Generated(decode(tokenizer, tokens[:end]), finished)
        if on_batch is not None:
            on_batch(len(chosen))
    return results


@contextlib.contextmanager
def _without_own_settings(model: nn.Module) -> Iterator[None]:
    """transformers fills whatever a given config leaves open from the model's own."""
    base = base_of(model)
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _run_prompts(model: nn.Module, padded: Padded, samples: int, task_index: int | None) -> DynamicCache | None:
    """Keys and values of all the prompts' tokens but the last, `samples` times each; None if the model keeps others."""
    rows = len(padded.input_ids)
    _, output = logits_at(
        model,
        torch.zeros((rows, 1), dtype=torch.long),
        input_ids=padded.input_ids[:, :-1],
        attention_mask=padded.attention_mask[:, :-1],
        position_ids=padded.position_ids[:, :-1],
        use_cache=True,
        **task_keywords(model, task_index, rows),
    )
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, DynamicCache) or not can_be_copied(cache):
        return None
    return copied(cache, torch.arange(rows, device=padded.input_ids.device).repeat_interleave(samples))


def generate_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Row],
    *,
    task_index: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    data_spec: DataSpec | None = None,
) -> list[str]:
    """Continue each prompt; returns the continuations alone, verbatim, in the order of the prompts.

    Prompts are tokenised as in training. The model's mode and torch's random state are afterwards as they were.

    Args:
        prompts: texts, or rows, e.g. of chat messages; what a row's last assistant turn says is not looked at.
        task_index: the task whose adapter route is taken; needed where the method goes by task.
        max_new_tokens: most tokens per answer; by default 256, or what the longest prompt leaves of the model's
            positions where that is less, which is said.
        temperature: 0 for the likeliest token each time; else the sampling temperature.
        top_p: when sampling, only the likeliest tokens that make up this probability are drawn from.
        seed: of the sampling; the same seed, prompts and batch size give the same texts.
        data_spec: how rows become tokens; the default is `DataSpec()`.

    Raises:
        HeadwaterError: `prompts` is a single text, a prompt is empty or too long for the model, a setting is out of
            range, or the method needs a task and none is given.
    """
    if isinstance(prompts, str):  # whose letters would be the prompts
        raise HeadwaterError(Problem(f"{prompts!r} is one prompt, not a list", "prompts", "put it into a list"))
    spec = data_spec or DataSpec()
    rows = [Row(prompt=p, completion="") if isinstance(p, str) else _answerable(p) for p in prompts]
    encoded = [encode_prompt(row, tokenizer, spec) for row in rows]
    if max_new_tokens is None:
        max_new_tokens = _room(model, encoded)
    problems = [
        Problem(f"{name} is {value}, which is out of range", fix=fix)
        for name, value, good, fix in (
            ("max_new_tokens", max_new_tokens, max_new_tokens > 0, "Give a whole number above 0."),
            ("temperature", temperature, temperature >= 0, "Give 0, or the sampling temperature."),
            ("top_p", top_p, 0 < top_p <= 1, "Give a number above 0 and at most 1."),
            ("batch_size", batch_size, batch_size > 0, "Give a whole number above 0."),
            ("seed", seed, is_seed(seed), f"Give a number {RANGE}."),
        )
        if not good
    ]
    if task_index is None and needs_task_ids(model):
        problems.append(Problem("the adapter goes by task, and no task was given", fix="Name one (--task NAME)."))
    places, fix = (
        [f"prompt {i + 1}" for i in range(len(rows))],
        "Shorten the prompt, or lower max_new_tokens (--max-new-tokens).",
    )
    problems += length_problems(model, encoded, places, [max_new_tokens] * len(rows), fix)
    if problems:
        raise HeadwaterError(*problems)
    with evaluating(model):
        torch.manual_seed(seed)
        generated = generate_from_ids(
            model,
            tokenizer,
            encoded,
            task_index=task_index,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
        )
    return [answer.text for answer in generated]


def _answerable(row: Row) -> Row:
    """The row with an assistant's turn at the end, whose place the answer takes."""
    if not row.messages or row.messages[-1]["role"] == "assistant":
        return row
    return replace(row, messages=(*row.messages, {"role": "assistant", "content": "?"}))


def _room(model: nn.Module, prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that an answer may have where nobody says: `NEW_TOKENS`, or what the longest prompt leaves."""
    limit, longest = max_positions(model), max(map(len, prompts), default=0)
    left = NEW_TOKENS if limit is None else limit - longest
    if 0 < left < NEW_TOKENS:
        what = "answers end after %d tokens: that is what the longest prompt leaves of the model's %d"
        logger.warning(what, left, limit)
    return max(1, min(left, NEW_TOKENS))  # a prompt that leaves nothing is an error that names it


def length_problems(
    model: nn.Module, prompts: Sequence[Sequence[int]], places: Sequence[str], rooms: Sequence[int], fix: str
) -> list[Problem]:
    """What is wrong with the lengths of tokenised prompts, each of which needs so many more tokens behind it.

    Args:
        fix: what to do about a prompt that is too long.
    """
    limit = max_positions(model)
    problems = []
    for prompt, place, more in zip(prompts, places, rooms, strict=True):
        if not prompt:
            problems.append(Problem("the prompt has no tokens, so nothing predicts the answer", place))
        elif limit is not None and len(prompt) + more > limit:
            what = f"{len(prompt)} tokens of prompt and {more} of answer are more than the model's {limit}"
            problems.append(Problem(what, place, fix))
    return problems
