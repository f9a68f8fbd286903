"""A task as one vector: what a model makes of the task's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..data.encode import DataSpec, encode_prompt
from ..data.rows import one_screen
from ..errors import HeadwaterError
from ..evaluation.forward import base_of, evaluating, input_device, logits_at, pad, pad_id
from ..evaluation.generate import length_problems
from ..evaluation.scoring import sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.rows import Row

Position = Literal["last_prompt_token", "generated_mean"]
_BATCH = 8


def task_vector(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    data_spec: DataSpec,
    *,
    layer: int = -1,
    position: Position = "last_prompt_token",
    samples: int = 30,
    normalize: bool = True,
    max_new_tokens: int = 32,
) -> Tensor:
    """The mean hidden state over some of a task's prompts, `(d,)` float32. Answers are not shown to the model.

    Args:
        model: the base model; an unseen task has no adapter. The released code takes the task's own adapter: give the
            adapted model for that.
        rows: of the task; `samples` of them are drawn with a fixed seed.
        layer: index into the model's hidden states; -1 is what the vocabulary head sees.
        position: "last_prompt_token" reads the state that the answer starts from; "generated_mean", as the released
            code, averages over the last position of the prompt and of each greedy decoding step.
        normalize: scale the vector to length 1.

    Raises:
        HeadwaterError: a prompt is empty, or longer than the model takes.
    """
    chosen = sample(rows, samples)
    prompts = [encode_prompt(row, tokenizer, data_spec) for row in chosen]
    room = max_new_tokens if position == "generated_mean" else 0
    places = [row.where for row in chosen]
    if problems := length_problems(model, prompts, places, [room] * len(prompts), "shorten the prompt"):
        raise HeadwaterError(*one_screen({"task vector": problems}))
    with evaluating(model):
        states = (_last_states if position == "last_prompt_token" else _generated_states)(
            model, tokenizer, prompts, layer, max_new_tokens
        )
    mean = states.mean(0)
    return nn.functional.normalize(mean, dim=0) if normalize else mean


def _last_states(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], layer: int, _: int
) -> Tensor:
    found = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        padded = pad(batch, pad_id(tokenizer)).to(input_device(model))
        last = padded.attention_mask.sum(1, keepdim=True).cpu() - 1
        _logits, output = logits_at(
            model,
            last,
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            output_hidden_states=True,
        )
        hidden = output.hidden_states[layer]
        found.append(hidden[torch.arange(len(batch)), last.squeeze(1)].float().cpu())
    return torch.cat(found)


def _generated_states(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], layer: int, max_new_tokens: int
) -> Tensor:
    found = []
    for prompt in prompts:  # one by one: a row's mean must not run on over its neighbours' longer answers
        ids = torch.tensor([prompt], device=input_device(model))
        output = base_of(model).generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_id(tokenizer),
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        found += [step[layer][0, -1].float().cpu() for step in output.hidden_states]
    return torch.stack(found)
