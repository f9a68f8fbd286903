"""One adapter made of several, with fixed weights.

    concat    sum_t w_t s_t B_t A_t; its rank is the sum of ranks             (LoRI, arXiv 2504.07448: concatenated)
    fuse      (sum_t w_t s_t B_t) (sum_t w_t A_t), rank r                     (LoraRetriever, arXiv 2402.09997: fusion)
    linear    (sum_t sqrt(w_t s_t) B_t) (sum_t sign sqrt(w_t s_t) A_t), rank r       (PEFT's `linear`, used with LoRI)

The last two average factors, not updates, and so add cross terms B_i A_j, i != j; what they give changes when an
adapter's factors are written as (B R, R^-1 A), which is the same adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..errors import HeadwaterError, Problem
from .adapter import Adapter, LowRank

Parts = list[tuple[float, LowRank]]


def concat(adapters: Sequence[Adapter], weights: Sequence[float], name: str = "concat") -> Adapter:
    """The weighted sum of the adapters' updates; ranks and scalings may differ.

    Weights and scalings go into B, which is rounded to the factors' dtype: 0.2 % of the update in bfloat16.
    """

    def layer(parts: Parts) -> LowRank:
        A = torch.cat([_wide(part.A) for _, part in parts])
        return _rounded(parts, A, torch.cat([_wide(part.B) * (w * part.scaling) for w, part in parts], 1))

    return _merge(adapters, weights, name, layer)


def fuse(adapters: Sequence[Adapter], weights: Sequence[float], name: str = "fuse") -> Adapter:
    """Weighted sums of the factors, A and B apart. Each adapter's scaling goes with its B.

    Raises:
        HeadwaterError: ranks differ on a layer.
    """
    require_same_ranks(adapters)

    def layer(parts: Parts) -> LowRank:
        A = sum(_wide(part.A) * w for w, part in parts)
        B = sum(_wide(part.B) * (w * part.scaling) for w, part in parts)
        return _rounded(parts, A, B)

    return _merge(adapters, weights, name, layer)


def linear(adapters: Sequence[Adapter], weights: Sequence[float], name: str = "linear") -> Adapter:
    """What PEFT's `add_weighted_adapter(combination_type="linear")` gives, for rsLoRA adapters, too.

    Raises:
        HeadwaterError: ranks differ on a layer.
    """
    require_same_ranks(adapters)

    def layer(parts: Parts) -> LowRank:
        roots = [abs(w * part.scaling) ** 0.5 for w, part in parts]
        A = sum(_wide(p.A) * (root if w * p.scaling >= 0 else -root) for root, (w, p) in zip(roots, parts, strict=True))
        B = sum(_wide(part.B) * root for root, (_, part) in zip(roots, parts, strict=True))
        return _rounded(parts, A, B)

    return _merge(adapters, weights, name, layer)


WAYS: dict[str, Callable[..., Adapter]] = {"concat": concat, "fuse": fuse, "linear": linear}


def _merge(
    adapters: Sequence[Adapter], weights: Sequence[float], name: str, layer: Callable[[Parts], LowRank]
) -> Adapter:
    if not adapters or len(adapters) != len(weights):
        what = f"{len(adapters)} adapters and {len(weights)} weights"
        raise HeadwaterError(Problem(what, "weights", "give one weight per adapter, and at least one"))
    layers = dict.fromkeys(known for adapter in adapters for known in adapter.layers)
    parts = {
        known: [(float(w), a.layers[known]) for w, a in zip(weights, adapters, strict=True) if known in a.layers]
        for known in layers
    }
    return Adapter(name, {known: layer(found) for known, found in parts.items()})


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def _rounded(parts: Parts, A: Tensor | int, B: Tensor | int) -> LowRank:
    """In the dtype that holds the factors of all parts, whatever their order."""
    dtype = functools.reduce(torch.promote_types, (factor.dtype for _, part in parts for factor in (part.A, part.B)))
    return LowRank(torch.as_tensor(A).to(dtype), torch.as_tensor(B).to(dtype), 1.0)


def require_same_ranks(adapters: Sequence[Adapter], fix: str = "mix their outputs instead (concat)") -> None:
    """Check that adapters agree in rank wherever they meet, so that their factors can be averaged.

    Raises:
        HeadwaterError: they do not; `fix` says what to do.
    """
    ranks: dict[str, set[int]] = {}
    for adapter in adapters:
        for name, factors in adapter.layers.items():
            ranks.setdefault(name, set()).add(factors.rank)
    mixed = {name: found for name, found in ranks.items() if len(found) > 1}
    if mixed:
        name, found = next(iter(mixed.items()))
        what = f"adapters of different ranks cannot be averaged factor by factor: {sorted(found)} at {name}"
        raise HeadwaterError(Problem(what, ", ".join(a.name for a in adapters), fix))


def require_one_shape(adapters: Sequence[Adapter], fix: str) -> None:
    """Check that adapters agree in layers, ranks and scalings, so that their factors can be added.

    Raises:
        HeadwaterError: all that differs from the first; `fix` says what to do.
    """
    first, problems = adapters[0], []
    for other in adapters[1:]:
        if other.layers.keys() != first.layers.keys():
            problems.append(Problem(f"it adapts other layers than {first.name}", other.name))
            continue
        for what in ("rank", "scaling"):
            mine, theirs = ({getattr(f, what) for f in a.layers.values()} for a in (first, other))
            if any(getattr(f, what) != getattr(first.layers[n], what) for n, f in other.layers.items()):
                problems.append(Problem(f"its {what} is {_list(theirs)}, and {first.name}'s {_list(mine)}", other.name))
    if problems:
        raise HeadwaterError(*problems[:-1], Problem(problems[-1].what, problems[-1].where, fix))


def _list(values: Iterable[float]) -> str:
    return " or ".join(f"{value:g}" for value in sorted(values))
