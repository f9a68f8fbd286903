"""Equal trainable parameters: the rank, or the number of heads, whose adapter comes nearest to a number of them."""

from __future__ import annotations

import bisect
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from torch import nn

from headwater.base_model import shape_of
from headwater.errors import HeadwaterError, Problem
from headwater.methods.registry import make_config, method
from headwater.training.adapter import add_adapter

if TYPE_CHECKING:
    from headwater.config import RunConfig

LARGEST = 8192
"""Largest rank or number of heads that is tried."""
_INTERPOLATED = 6  # guesses from a line through what is known; halving follows, should the count be no line


def trainable_parameters(config: RunConfig, section: dict[str, Any]) -> int:
    """Counts what a `method:` section trains, by making the adapter on a base model without weights.

    Raises:
        HeadwaterError: if the base model's config cannot be loaded, or the adapter does not fit it.
    """
    base = shape_of(config.model_name_or_path, trust_remote_code=config.model.trust_remote_code)
    for module in base.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            # Ones that take no memory, for adapters whose start goes by the base weights: only sizes matter here.
            ones = torch.ones((), dtype=weight.dtype).expand(weight.shape)
            module.weight = nn.Parameter(ones, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what training is to say, it says
        model = add_adapter(base, section, low_cpu_mem_usage=True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def field_to_solve(name: str, match: str) -> str:
    """The field that `match` (rank, heads or a field's name) means for a method; plain LoRA has but its rank.

    Raises:
        HeadwaterError: if the method has no such whole-number field.
    """
    known = None if name == "lora" else method(name)
    if match in ("rank", "heads"):
        rank, heads = (known.rank_field, known.heads_field) if known else ("r", None)
        return heads if match == "heads" and heads else rank
    whole = [f.name for f in dataclasses.fields(known.config) if f.type in ("int", int)] if known else ["r"]
    if match not in whole:
        what = f"method {name} has no field {match!r} that is a whole number"
        raise HeadwaterError(Problem(what, "match", "rank, heads, none, or a field such as r, num_heads, num_experts"))
    return match


def solvable(name: str) -> list[str]:
    """The fields that say how large a method is: its rank, and its number of heads if it has some."""
    return list(dict.fromkeys(field_to_solve(name, match) for match in ("rank", "heads")))


def solve(config: RunConfig, field: str, budget: int) -> tuple[dict[str, Any], int]:
    """The config's `method:` section with `field` set so that its trainable parameters are nearest to `budget`.

    Where the rank is solved for, `lora_alpha` follows so that the scale of the update stays what it was: it, not alpha,
    says how large a step of a given learning rate is, so that a smaller rank is not a larger learning rate in disguise.

    Returns:
        The section and its number of trainable parameters.

    Raises:
        HeadwaterError: if the adapter cannot be made for any value.
    """
    section = dict(config.method)
    if field == "r" and (section.get("rank_pattern") or section.get("alpha_pattern")):
        pattern = "rank_pattern" if section.get("rank_pattern") else "alpha_pattern"
        fix = "leave the pattern out, or solve for another field (match: heads) or none"
        raise HeadwaterError(Problem("a rank per layer leaves no single rank to solve for", f"method.{pattern}", fix))
    start: int = getattr(_config(section), field)
    allowed = [value for value in range(1, LARGEST + 1) if value == start or _accepts(section, field, value)]
    counts: dict[int, int] = {}

    def count(value: int) -> int:
        counts[value] = trainable_parameters(config, _with(section, field, value))
        return counts[value]

    best = _nearest(count, allowed, start, budget)
    return _with(section, field, best), counts[best]


def _nearest(count: Callable[[int], int], allowed: Sequence[int], start: int, budget: int) -> int:
    """The allowed value whose count, which rises with it, is nearest to the budget; the smaller of two equally near.

    A value that cannot be counted bounds the search: from above, unless a larger one could be counted.
    """
    counts: dict[int, int] = {}
    first: HeadwaterError | None = None
    low, high, index, tries = -1, len(allowed), bisect.bisect_left(allowed, start), 0
    while high - low > 1:
        value = allowed[index]
        try:
            counts[value] = count(value)
        except HeadwaterError as error:
            first = first or error
            below = any(value < known for known in counts)
        else:
            below = counts[value] <= budget
        low, high = (index, high) if below else (low, index)
        tries += 1
        index = min(max(_guess(counts, allowed, budget, (low, high), tries), low + 1), high - 1)
    if not counts:
        assert first is not None
        raise first
    return min(counts, key=lambda value: (abs(counts[value] - budget), value))


def _guess(counts: dict[int, int], allowed: Sequence[int], budget: int, inside: tuple[int, int], tries: int) -> int:
    """Where to look next: on the line through the two counts nearest to the budget, or half-way."""
    nearest = sorted(counts, key=lambda value: abs(counts[value] - budget))[:2]
    if tries >= _INTERPOLATED or not nearest:
        return sum(inside) // 2
    (x, y), (x0, y0) = [*((value, counts[value]) for value in nearest), (0, 0)][:2]
    slope = (y - y0) / (x - x0)
    return sum(inside) // 2 if slope <= 0 else bisect.bisect_right(allowed, x + (budget - y) / slope) - 1


def _with(section: dict[str, Any], field: str, value: int) -> dict[str, Any]:
    before = _config(section)
    changed = {**section, field: value}
    if field == "r" and value != before.r:  # type: ignore[attr-defined]
        factor = _scaling(before, before) / _scaling(_config(changed), before)
        alpha = before.lora_alpha * factor  # type: ignore[attr-defined]
        changed["lora_alpha"] = round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha
    return changed


def _scaling(config: PeftConfig, alpha_of: PeftConfig) -> float:
    """The factor on the update, at one config's rank and the other's alpha; PEFT's LoRA has no method that tells it."""
    r, alpha = config.r, alpha_of.lora_alpha  # type: ignore[attr-defined]
    if hasattr(config, "scaling"):
        return config.scaling(r, alpha)
    return alpha / r**0.5 if config.use_rslora else alpha / r  # type: ignore[attr-defined]


def _config(section: dict[str, Any]) -> PeftConfig:
    fields = dict(section)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_config(fields.pop("name"), **fields)


def _accepts(section: dict[str, Any], field: str, value: int) -> bool:
    try:
        _config({**section, field: value})
    except HeadwaterError:
        return False
    return True
