"""Forwards of a causal language model for scoring: batches of token ids in, logits only where they are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwater.tuner import is_adapted, needs_task_ids
from headwater.tuner.context import LABELS
from headwater.tuner.model import sees_batch

LOGITS_BUDGET = 1 << 26
"""Most logits (positions x vocabulary) that one forward makes: 256 MiB in float32."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's own mode and torch's random state are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model; any other model as it is."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def accepts(model: nn.Module, *keywords: str) -> bool:
    """Whether the transformers model's forward names all of these keywords."""
    return set(keywords) <= set(inspect.signature(base_of(model).forward).parameters)


def task_keywords(model: nn.Module, task_index: int | None, batch: int) -> dict[str, Tensor]:
    """The forward's `headwater_task_ids` (int64 `[batch]`); nothing without a task or where the model needs none."""
    if task_index is None or not needs_task_ids(model):
        return {}
    return {"headwater_task_ids": torch.full((batch,), task_index, device=input_device(model))}


def label_keywords(model: nn.Module, labels: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Tells an adapted model which tokens are answers, -100 where none is: a method that goes by the prompt must not
    see what it is scored on. The model itself gets no labels, so it computes no loss."""
    return {LABELS: pad(labels, -100).input_ids.to(input_device(model))} if is_adapted(model) else {}


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its token ids: the device of its input embeddings."""
    return next(base_of(model).get_input_embeddings().parameters()).device


def vocabulary_size(model: nn.Module) -> int:
    """Width of the model's logits."""
    return base_of(model).config.get_text_config().vocab_size


def max_positions(model: nn.Module) -> int | None:
    """Most tokens of a sequence that the model's config allows; None if it names no limit."""
    return getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)


def pad_id(tokenizer: Any) -> int:
    """An id to fill padding with. Padding is masked by length, so any id will do: pad, else eos, else 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in known if i is not None), 0)


@dataclass(frozen=True)
class Padded:
    """A batch of sequences: `input_ids`, `attention_mask` and `position_ids`, each int64 `[batch, longest]`."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    def to(self, device: torch.device) -> Padded:
        return Padded(self.input_ids.to(device), self.attention_mask.to(device), self.position_ids.to(device))


def pad(sequences: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> Padded:
    """Pad with `fill` on the right, or on the left; positions count the real tokens from 0."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), fill)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[i, where] = torch.tensor(sequence, dtype=torch.long)
        mask[i, where] = 1
    return Padded(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))


@contextmanager
def _only_at(model: nn.Module, positions: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let the vocabulary head see only `positions` (int64 `[batch, m]`); yields a function for the logits' clean-up.

    The hook sits before the head, so it works for any architecture: whatever follows the head is elementwise. A model
    that does not call its head as a module makes all logits; the yielded function then selects from those.
    """
    selected = False

    def select(hidden: Tensor) -> Tensor:
        index = positions.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index)

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal selected
        selected = True
        return (select(args[0]), *args[1:])

    head = base_of(model).get_output_embeddings()
    narrow = head is not None and not sees_batch(model, head)
    handle = head.register_forward_pre_hook(hook) if narrow else None
    try:
        yield lambda logits: logits if selected else select(logits)
    finally:
        if handle is not None:
            handle.remove()


def logits_at(model: nn.Module, positions: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
    """Run the model and return its float32 logits `[batch, m, vocabulary]` at `positions`, and its whole output.

    Args:
        positions: int64 `[batch, m]`, indices into the sequence axis of this forward's `input_ids`.
        inputs: keywords of the model's forward.
    """
    # before the forward: a copy in the middle of it would wait for all that comes before the head
    with _only_at(model, positions.to(input_device(model), non_blocking=True)) as finish:
        output = model(**inputs)
    return finish(output.logits).float(), output


def chunks(sizes: Sequence[int], batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Cut the items 0, 1, ... into runs of at most `batch_size` whose logits keep to `LOGITS_BUDGET`.

    Args:
        sizes: per item, the positions that it needs logits at; a run costs its largest size times its length.
    """
    run: list[int] = []
    widest = 0
    for item, size in enumerate(sizes):
        widest = max(widest, size)
        if run and (len(run) == batch_size or widest * (len(run) + 1) * vocabulary > LOGITS_BUDGET):
            yield run
            run, widest = [], size
        run.append(item)
    if run:
        yield run
