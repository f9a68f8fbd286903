"""Whether tasks pull an adapter in opposite directions: the cosine between their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwater.data.collate import Collator
from headwater.data.encode import IGNORED, Encoded
from headwater.errors import HeadwaterError, Problem
from headwater.evaluation.forward import input_device
from headwater.tuner import is_adapted
from headwater.tuner.context import KEYWORD, LABELS

_BATCH = 4


@dataclass(frozen=True)
class Conflict:
    """Cosines between tasks' gradients with respect to some of an adapter's parameters.

    Args:
        tasks: their names.
        cosine: `[T][T]`; NaN where a task's gradient is zero.
    """

    tasks: list[str]
    cosine: list[list[float]]

    @property
    def pairs(self) -> list[float]:
        """Of every two different tasks, where both have a gradient."""
        values = [self.cosine[i][j] for i, j in combinations(range(len(self.tasks)), 2)]
        return [value for value in values if value == value]

    @property
    def mean(self) -> float | None:
        return sum(self.pairs) / len(self.pairs) if self.pairs else None

    @property
    def negative(self) -> float | None:
        """The share of pairs that pull against each other: cosine below 0."""
        return sum(value < 0 for value in self.pairs) / len(self.pairs) if self.pairs else None

    def as_dict(self) -> dict[str, Any]:
        return {"cosine": self.cosine, "mean": self.mean, "negative": self.negative}


def gradient_conflict(model: nn.Module, rows: Mapping[str, Sequence[Encoded]], *, fill: int = 0) -> dict[str, Conflict]:
    """Cosines between the gradients of the tasks' losses with respect to a model's trainable parameters, as it is.

    A task's loss is the mean over the completion tokens of its rows, without dropout and without auxiliary losses.
    Parameters are taken together over layers, each as a part of one long vector, so layers with large gradients count
    most. The model is left as it was.

    Args:
        model: a causal language model with an adapter, trained or fresh, whose parameters are trainable.
        rows: task name -> encoded rows, at least one with a completion.
        fill: any token id, to pad with.

    Returns:
        Which parameters -> their `Conflict`: `all`; each kind by its name, such as `A`, `B`, `router`; and
        `head 1` ... `head N` for the up-projections of each head, where there are several.

    Raises:
        HeadwaterError: if nothing is trainable, or there are fewer than two tasks.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise HeadwaterError(Problem("the model has no trainable parameters", "gradient_conflict"))
    if len(rows) < 2:
        raise HeadwaterError(Problem("one task alone is in conflict with nothing", "tasks", "it takes two or more"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        gradients = [_gradient(model, list(parameters.values()), encoded, fill) for encoded in rows.values()]
    finally:
        for module, training in modes:
            module.training = training
    products: dict[str, Tensor] = {}
    for i, name in enumerate(parameters):
        stacked = torch.stack([gradient[i] for gradient in gradients])
        for part, values in _parts(name, stacked).items():
            flat = values.flatten(1).double()
            products[part] = products.get(part, 0) + flat @ flat.T
    order = sorted(products, key=lambda part: (part != "all", part.startswith("head "), part))
    return {part: Conflict(list(rows), _cosines(products[part])) for part in order}


def _gradient(model: nn.Module, parameters: list[nn.Parameter], rows: Sequence[Encoded], fill: int) -> list[Tensor]:
    """Of the mean loss over all completion tokens, on the CPU in float32."""
    ordered = sorted(rows, key=len)
    tokens = sum(label != IGNORED for row in rows for label in row.labels[1:])
    total = [torch.zeros(p.shape) for p in parameters]
    for start in range(0, len(ordered), _BATCH):
        batch = Collator(fill)(ordered[start : start + _BATCH])
        batch = {name: value.to(input_device(model)) for name, value in batch.items()}
        more = {KEYWORD: batch[KEYWORD], LABELS: batch["labels"]} if is_adapted(model) else {}
        with torch.enable_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **more).logits
            wanted = batch["labels"][:, 1:] != IGNORED
            targets = batch["labels"][:, 1:][wanted]
            loss = F.cross_entropy(logits[:, :-1][wanted].float(), targets, reduction="sum") / max(tokens, 1)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for sum_, gradient in zip(total, found, strict=True):
            if gradient is not None:
                sum_ += gradient.float().cpu()
    return total


def _parts(name: str, gradients: Tensor) -> dict[str, Tensor]:
    """What a parameter counts towards; `gradients`: `[T, *shape]`."""
    pieces = name.split(".")
    kind = next((piece.removeprefix("lora_") for piece in pieces if piece.startswith("lora_")), pieces[-1])
    parts = {"all": gradients, kind: gradients}
    if kind == "B" and gradients.dim() == 4 and gradients.shape[1] > 1:
        parts |= {f"head {n + 1}": gradients[:, n] for n in range(gradients.shape[1])}
    return parts


def _cosines(products: Tensor) -> list[list[float]]:
    """From all dot products `[T, T]`."""
    length = products.diagonal().sqrt()
    return (products / torch.outer(length, length)).tolist()  # 0 / 0 is NaN
